"""Rescale factors: the type, the rules that need no search, files, the published sets."""

from longrope.factors.published import published, published_names
from longrope.factors.rescale import RescaleFactors
from longrope.factors.rules import su_attention_factor, yarn_attention_factor

__all__ = [
    "RescaleFactors",
    "published",
    "published_names",
    "su_attention_factor",
    "yarn_attention_factor",
]
