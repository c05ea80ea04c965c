"""Rescale factors inside Hugging Face models: `apply`, `remove`, and factors by row."""

from longrope.patching.apply import (
    SUPPORTED_MODEL_TYPES,
    apply,
    remove,
    rotary_of,
    row_lengths,
    rows,
)
from longrope.patching.settings import RopeSettings, rope_settings

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "RopeSettings",
    "apply",
    "remove",
    "rope_settings",
    "rotary_of",
    "row_lengths",
    "rows",
]
