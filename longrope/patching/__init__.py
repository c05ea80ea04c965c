"""Rescale factors inside Hugging Face models: `apply`, `remove`, and factors by row."""

from longrope.patching.apply import apply, remove, rotary_of, row_lengths, rows
from longrope.patching.families import FAMILIES, SUPPORTED_MODEL_TYPES, Family
from longrope.patching.settings import RopeSettings, rope_settings

__all__ = [
    "FAMILIES",
    "SUPPORTED_MODEL_TYPES",
    "Family",
    "RopeSettings",
    "apply",
    "remove",
    "rope_settings",
    "rotary_of",
    "row_lengths",
    "rows",
]
