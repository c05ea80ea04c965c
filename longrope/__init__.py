"""Extend the context window of RoPE language models (LongRoPE, arXiv 2402.13753)."""

from __future__ import annotations

__version__ = "0.1.0"  # the one place: pyproject.toml and the extension read it from here

import importlib

from longrope.factors import (
    RescaleFactors,
    Tiers,
    published,
    published_names,
    su_attention_factor,
    yarn_attention_factor,
)

#: Public names whose modules are imported on first use, so that `import longrope.ops` starts
#: without transformers.
_LAZY = {
    "_C": "longrope._native",
    "SearchResult": "longrope.factor_search.history",
    "apply": "longrope.patching",
    "load_data": "longrope.documents",
    "perplexity": "longrope.evaluation.perplexity",
    "remove": "longrope.patching",
    "rope_settings": "longrope.patching",
    "row_lengths": "longrope.patching",
    "search": "longrope.factor_search.run",
}

__all__ = [
    "RescaleFactors",
    "SearchResult",
    "Tiers",
    "__version__",
    "apply",
    "load_data",
    "perplexity",
    "published",
    "published_names",
    "remove",
    "rope_settings",
    "row_lengths",
    "search",
    "su_attention_factor",
    "yarn_attention_factor",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'longrope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
