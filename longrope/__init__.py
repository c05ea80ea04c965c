"""Extend the context window of RoPE language models (LongRoPE, arXiv 2402.13753)."""

from __future__ import annotations

__version__ = "0.1.0"  # the one place: pyproject.toml and the extension read it from here

import importlib

from longrope.documents import load_data
from longrope.evaluation import perplexity

#: Public names whose modules are imported on first use.
_LAZY = {
    "_C": "longrope._native",
}

__all__ = ["__version__", "load_data", "perplexity"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'longrope' has no attribute {name!r}")
