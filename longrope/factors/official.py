"""What the numbers of a CSV file of the official LongRoPE code are.

Its search writes lambdas alone (`dim_mono`), with the number of start tokens before them
(`dim_mono_n`), or with two indices of pairs before them (`dim_piece_mono`: the ends of the part in
which lambda rises). The file does not say which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longrope._validation import choice, even, integer
from longrope.factors.rules import su_attention_factor, yarn_attention_factor

#: Rotated channels come in sixteens, so pairs in eights.
_PAIRS = 8


def fields_of(
    values: Sequence[float], settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of `RescaleFactors` from the numbers of a file and what is said beside it.

    `settings` are the caller's fields, whose attention factor may be `"su"` or `"yarn"`;
    `defaults` are those of the class. Raises `ValueError` where they do not fit the file.
    """
    rotary_dim = settings.get("rotary_dim")
    start_tokens, lambdas = layout(
        values, None if rotary_dim is None else even("rotary_dim", rotary_dim)
    )
    fields: dict[str, Any] = {"lambdas": lambdas, "rotary_dim": 2 * len(lambdas)}
    if start_tokens is not None:
        if settings.get("start_tokens", start_tokens) != start_tokens:
            raise ValueError(
                f"start_tokens: expected {start_tokens}, which the file states, "
                f"got {settings['start_tokens']}"
            )
        fields["start_tokens"] = start_tokens
    fields |= settings
    rule = fields.get("attention_factor")
    if isinstance(rule, str):
        choice("attention_factor", rule, ("su", "yarn"))
        original, target = (
            integer(name, settings.get(name, defaults[name]), 1)
            for name in ("original_length", "target_length")
        )
        su = rule == "su"
        ratio = target / original
        fields["attention_factor"] = (
            su_attention_factor(ratio, original) if su else yarn_attention_factor(ratio)
        )
    return fields


def layout(
    values: Sequence[float], rotary_dim: int | None = None
) -> tuple[int | None, list[float]]:
    """Return `(start_tokens, lambdas)`; None for the start tokens where the file has none.

    With `rotary_dim` the number of values decides. Without it the fitting layout is taken whose
    lambdas are a multiple of 8, and else the one that a first value which cannot be a factor calls
    for: 0, or a whole number that falls to less than half in the next.
    """
    values = list(values)
    fits = {0: all(value > 0 for value in values), 1: _is_count(values), 2: _are_indices(values)}
    if rotary_dim is not None:
        leading = len(values) - rotary_dim // 2
    else:
        whole = [
            k for k in (0, 1, 2) if fits[k] and len(values) - k and not (len(values) - k) % _PAIRS
        ]
        leading = whole[0] if whole else int(_cannot_be_a_factor(values))
    if leading not in fits or not fits[leading]:
        leading = 0  # `RescaleFactors` says what is wrong with it
    return (int(values[0]) if leading == 1 else None), values[leading:]


def _is_count(values: Sequence[float]) -> bool:
    first, *rest = values
    return bool(rest) and first >= 0 and first.is_integer() and all(v > 0 for v in rest)


def _are_indices(values: Sequence[float]) -> bool:
    if len(values) < 3 or not all(value > 0 for value in values[2:]):
        return False
    first, second = values[:2]
    whole = first.is_integer() and second.is_integer()
    return whole and 0 <= first <= second <= len(values) - 2


def _cannot_be_a_factor(values: Sequence[float]) -> bool:
    return _is_count(values) and (values[0] == 0 or values[0] >= 2 * values[1])
