"""`longrope demo`: a packaged tiny model, its text, and the eight-fold extension of its window."""

from pathlib import Path

#: A model of bytes with a window of 512 tokens that finds passkeys: `demo.train_retriever`. Its
#: `tiers.json` reaches eight times that window: `benchmarks/retrieval.py` in the repository.
RETRIEVER = Path(__file__).with_name("retriever")
