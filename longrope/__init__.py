from longrope.documents import load_data
from longrope.evaluation import perplexity

__all__ = ["load_data", "perplexity"]
