"""Measuring models: perplexity, and what every measure stands on."""

from longrope.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
