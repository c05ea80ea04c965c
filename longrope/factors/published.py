"""The 30 factor sets that Microsoft published for LLaMA2-7B and Mistral-7B."""

from __future__ import annotations

import difflib
import functools
import json
from importlib import resources

from longrope.factors.rescale import RescaleFactors
from longrope.factors.rules import su_attention_factor


@functools.cache
def _table() -> dict:
    file = resources.files("longrope") / "data" / "published_factors.json"
    return json.loads(file.read_text(encoding="utf-8"))


def published_names() -> list[str]:
    """Return the names that `published` knows."""
    return list(_table()["factors"])


def published(name: str) -> RescaleFactors:
    """Return a published set of rescale factors by name.

    `"llama2-7b-2048k-ft256k"` is for sequences of 2048k tokens (k = 1024) on LLaMA2-7B fine-tuned
    to 256k; `"llama2-7b-ft256k"` is the set used during that fine-tuning, `"llama2-7b-4k-ft256k"`
    the one that recovers short sequences. Those of Mistral-7B are named the same way;
    `published_names()` lists all. They belong to the fine-tuned models and fit the base models less
    well.

    The original length is 4096, `rope_theta` 10000 and `rotary_dim` 128 for all. The published
    files hold the lambdas alone. The other two settings are those of the official code's scripts:
    no start tokens, and the attention factor `su` at the ratio of the set,
    `sqrt(1 + ln s / ln 4096)`, which is 1 for the 4k sets. Change them with `.replace()`.

    Source: https://github.com/microsoft/LongRoPE (MIT licence), as named in the packaged
    `longrope/data/published_factors.json`.

    Raises
    ------
    ValueError
        For an unknown name, with the nearest known ones.
    """
    table = _table()
    if name not in table["factors"]:
        near = difflib.get_close_matches(str(name), table["factors"], n=3, cutoff=0.4)
        raise ValueError(
            f"name: expected one of longrope.published_names(), such as "
            f"{', '.join(near or list(table['factors'])[:3])}; got {name!r}"
        )
    entry = table["factors"][name]
    original, target = table["original_length"], entry["target_length"]
    return RescaleFactors(
        entry["lambdas"],
        attention_factor=su_attention_factor(target / original, original),
        original_length=original,
        target_length=target,
        rope_theta=table["rope_theta"],
        rotary_dim=table["rotary_dim"],
    )
