"""Checks of settings, with errors in one sentence: the argument, what was expected, what came."""

from __future__ import annotations

import functools
import json
import math
import numbers
from collections.abc import Collection
from typing import Any

import numpy as np

#: The largest number that tensors and kernels take.
_INT64 = 2**63 - 1


def integer(name: str, value, least: int, most: int = _INT64) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {_brief(value)}")
    if value > most:
        raise ValueError(f"{name}: expected an integer of at most {most}, got {_brief(value)}")
    return int(value)


#: Checks of whole numbers from 0 or 1 on.
natural, count = functools.partial(integer, least=0), functools.partial(integer, least=1)
#: The check of a seed, of which numpy takes any number of bits, and a journal 128.
seed = functools.partial(integer, least=0, most=2**128 - 1)


def choice(name: str, value, choices: Collection[str]) -> str:
    if value not in choices:
        listed = ", ".join(repr(known) for known in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")
    return value


def probability(name: str, value) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 < value <= 1:
        raise ValueError(f"{name}: expected 0 < p <= 1, got {value!r}")
    return float(value)


def switch(name: str, value) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def even(name: str, value) -> int:
    if integer(name, value, 2) % 2:
        raise ValueError(f"{name}: expected an even number, got {value}")
    return int(value)


def positive(name: str, value, above: float = 0) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if real else math.nan
    except OverflowError:  # a whole number may be larger than any float
        number = math.inf
    if not above < number < math.inf:
        raise ValueError(f"{name}: expected a finite number above {above}, got {_brief(value)}")
    return number


def _brief(value) -> str:
    if isinstance(value, str) and len(value) > 60:
        return repr(value[:57] + "...")
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    return repr(value)


def checked_bos(name: str, value) -> str | bool | int:
    if isinstance(value, bool) or value == "auto":
        return value
    if isinstance(value, numbers.Integral) and value >= 0:
        return int(value)
    raise ValueError(f"{name}: expected 'auto', True, False or a token id, got {value!r}")


def real_array(expected: str, values) -> np.ndarray:
    """Return real numbers, or lists of them in any depth, as a new float64 array.

    Text and truth values, which numpy would make numbers of, are refused: they come from files and
    from arguments in the wrong place. `expected` begins the sentence of an error.
    """
    try:
        if hasattr(values, "detach"):  # a torch tensor of any dtype and device
            values = values.detach().cpu()
            values = (values.double() if values.is_floating_point() else values).numpy()
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
            for value in np.array(values, dtype=object).ravel():
                single = value.item() if np.ndim(value) == 0 and hasattr(value, "item") else value
                if isinstance(single, (str, bool)):
                    raise ValueError(f"{expected}, got {_brief(single)}")
                if not isinstance(single, numbers.Real):
                    raise TypeError
        return np.array(values, dtype=np.float64)
    except OverflowError:
        raise ValueError(f"{expected}, got a number that overflows float64") from None
    except TypeError:  # ragged, None, complex
        raise ValueError(f"{expected}, got {type(values).__name__} that is no array") from None


def lambda_array(values, rotary_dim: int) -> np.ndarray:
    expected = f"lambdas: expected {rotary_dim // 2} positive values (rotary_dim / 2)"
    array = real_array(expected, values)
    if array.shape[-1:] != (rotary_dim // 2,) or array.ndim not in (1, 3) or not array.size:
        came = len(array) if array.ndim == 1 else f"shape {list(array.shape)}"
        raise ValueError(f"{expected}, got {came}")
    wrong = ~(array > 0)  # NaN too; infinity is a pair that does not turn
    if wrong.any():
        index = np.unravel_index(int(np.argmax(wrong)), array.shape)
        place = int(index[0]) if array.ndim == 1 else list(map(int, index))
        raise ValueError(f"{expected}, got {array[index]} at index {place}")
    array.flags.writeable = False
    return array


def longer(original_length: int, target_length: int) -> None:
    original = integer("original_length", original_length, 1)
    if integer("target_length", target_length, 1) < original:
        raise ValueError(
            f"target_length: expected at least original_length ({original}), got {target_length}"
        )


def first_difference(
    old: Any, new: Any, name: str = "", places: tuple[str, str] = ("there", "here")
) -> str | None:
    """Name the first place where two JSON values differ, `"seed: 1 there, 2 here"`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            below = f"{name}.{key}" if name else str(key)
            found = first_difference(old.get(key), new.get(key), below, places)
            if found:
                return found
        return None
    if old == new:
        return None
    return f"{name}: {_short(old)} {places[0]}, {_short(new)} {places[1]}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
