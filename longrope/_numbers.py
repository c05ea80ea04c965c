"""Numbers that overflow: perplexities, and infinities in JSON, which has none."""

from __future__ import annotations

import math
from typing import Any

#: The largest loss, in nats, whose `exp` a float holds.
_MOST = math.log(1.7976931348623157e308)


def perplexity_of(nll: float | None) -> float:
    """Return the perplexity of a mean loss in nats; infinite where it overflows or is unknown."""
    return math.inf if nll is None or nll > _MOST else math.exp(nll)


def to_json(value: Any) -> Any:
    """Return numbers in nested lists with "inf" for infinity."""
    if isinstance(value, (list, tuple)):
        return [to_json(one) for one in value]
    return "inf" if value == math.inf else value


def from_json(value: Any) -> Any:
    """Return what `to_json` was given, tuples as lists."""
    if isinstance(value, list):
        return [from_json(one) for one in value]
    return math.inf if value == "inf" else value
