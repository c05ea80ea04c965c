"""Extend the context window of RoPE language models (LongRoPE, arXiv 2402.13753).

Everything here is imported on first use: `import longrope` itself loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # the one place: pyproject.toml and the extension read it from here

if TYPE_CHECKING:  # what type checkers and editors read; tests hold it to the tables below
    from longrope import checkpoints as checkpoints
    from longrope import demo as demo
    from longrope import errors as errors
    from longrope import evaluation as evaluation
    from longrope import extension as extension
    from longrope import factor_search as factor_search
    from longrope import factors as factors
    from longrope import model as model
    from longrope import ops as ops
    from longrope import patching as patching
    from longrope import report as report
    from longrope._native import _C as _C
    from longrope.checkpoints.export import export
    from longrope.checkpoints.load import load
    from longrope.documents import load_data
    from longrope.evaluation.exported import measure_export
    from longrope.evaluation.long_perplexity import long_perplexity
    from longrope.evaluation.passkey import passkey
    from longrope.evaluation.perplexity import perplexity
    from longrope.evaluation.ruler import ruler
    from longrope.evaluation.ruler_tasks import RULER_TASKS
    from longrope.evaluation.suite import evaluate
    from longrope.extension.config import FinetuneConfig
    from longrope.extension.recover import RecoverResult, recover
    from longrope.extension.run import ExtendResult, extend
    from longrope.factor_search.history import SearchResult
    from longrope.factor_search.run import search
    from longrope.factors import (
        RescaleFactors,
        Tiers,
        published,
        published_names,
        su_attention_factor,
        yarn_attention_factor,
    )
    from longrope.model import LongRoPEModel
    from longrope.patching.apply import apply, remove, row_lengths
    from longrope.patching.settings import rope_settings

#: Where a public name is defined.
_HOMES = {
    "RULER_TASKS": "longrope.evaluation.ruler_tasks",
    "LongRoPEModel": "longrope.model",
    "ExtendResult": "longrope.extension.run",
    "FinetuneConfig": "longrope.extension.config",
    "RecoverResult": "longrope.extension.recover",
    "RescaleFactors": "longrope.factors",
    "SearchResult": "longrope.factor_search.history",
    "Tiers": "longrope.factors",
    "_C": "longrope._native",
    "apply": "longrope.patching.apply",
    "evaluate": "longrope.evaluation.suite",
    "export": "longrope.checkpoints.export",
    "extend": "longrope.extension.run",
    "load": "longrope.checkpoints.load",
    "load_data": "longrope.documents",
    "long_perplexity": "longrope.evaluation.long_perplexity",
    "measure_export": "longrope.evaluation.exported",
    "passkey": "longrope.evaluation.passkey",
    "perplexity": "longrope.evaluation.perplexity",
    "published": "longrope.factors",
    "published_names": "longrope.factors",
    "recover": "longrope.extension.recover",
    "remove": "longrope.patching.apply",
    "rope_settings": "longrope.patching.settings",
    "row_lengths": "longrope.patching.apply",
    "ruler": "longrope.evaluation.ruler",
    "search": "longrope.factor_search.run",
    "su_attention_factor": "longrope.factors",
    "yarn_attention_factor": "longrope.factors",
}

#: Packages and modules that `import longrope` gives without an import of their own.
_MODULES = (
    "checkpoints",
    "demo",
    "errors",
    "evaluation",
    "extension",
    "factor_search",
    "factors",
    "model",
    "ops",
    "patching",
    "report",
)

__all__ = [
    "RULER_TASKS",
    "ExtendResult",
    "FinetuneConfig",
    "LongRoPEModel",
    "RecoverResult",
    "RescaleFactors",
    "SearchResult",
    "Tiers",
    "__version__",
    "apply",
    "evaluate",
    "export",
    "extend",
    "load",
    "load_data",
    "long_perplexity",
    "measure_export",
    "passkey",
    "perplexity",
    "published",
    "published_names",
    "recover",
    "remove",
    "rope_settings",
    "row_lengths",
    "ruler",
    "search",
    "su_attention_factor",
    "yarn_attention_factor",
]


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str):
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        if name in _MODULES:
            return importlib.import_module(f"longrope.{name}")
        raise AttributeError(f"module 'longrope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
