"""Rescale factors: the type, tiers of them, rules that need no search, files, published sets."""

from longrope.factors.heads import Shared
from longrope.factors.published import published, published_names
from longrope.factors.rescale import RescaleFactors
from longrope.factors.rules import su_attention_factor, yarn_attention_factor
from longrope.factors.tiers import Tiers

__all__ = [
    "RescaleFactors",
    "Shared",
    "Tiers",
    "published",
    "published_names",
    "su_attention_factor",
    "yarn_attention_factor",
]
