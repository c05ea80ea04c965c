"""What an export says: the one rule that other programs can follow, beside the tiers it is from.

Readers of exports know two sets of factors, one attention factor and one length. A sequence of at
most that length is turned by the short factors, a longer one by the long factors: the paper's rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from longrope._validation import switch
from longrope._warnings import warn
from longrope.factors import RescaleFactors, Tiers
from longrope.patching import RopeSettings, rope_settings
from longrope.patching.apply import check_fit, check_windows
from longrope.patching.families import decoder

#: What a float32 reader has in the place of an infinite lambda: its pair does not turn.
HUGE = 1e30


@dataclass(frozen=True)
class Plan:
    """What an export writes.

    Attributes
    ----------
    settings
        The rotary embedding of the model as loaded.
    tiers
        The tiers by position, for `longrope.load`.
    short, long
        The two sets of factors that readers know, without start tokens and with one attention
        factor. A sequence of at most `short.target_length` tokens takes `short`.
    choice
        Where `short` is from: "long", "none" or "factors".
    start_tokens
        Those of the last tier, which `long` has dropped.
    """

    settings: RopeSettings
    tiers: Tiers
    short: RescaleFactors
    long: RescaleFactors
    choice: str
    start_tokens: int = 0

    @property
    def rule(self) -> Tiers:
        """What readers do in a single prefill: `apply(model, plan.rule, tiers="row")`."""
        return Tiers([self.short, self.long])

    @property
    def crosses(self) -> bool:
        """Whether a sequence that grows beyond `short.target_length` changes its factors."""
        return not np.array_equal(self.short.lambdas, self.long.lambdas)

    @property
    def window(self) -> int:
        """The longest sequence, in tokens, that takes the short factors."""
        return self.short.target_length


def plan_export(
    model: Any,
    factors: RescaleFactors | Tiers,
    short: str | RescaleFactors = "long",
    drop_start_tokens: bool = False,
) -> Plan:
    """Return what an export of a model with these factors says; the arguments are `export`'s.

    Raises `ValueError` or `TypeError`, in one sentence.
    """
    settings = rope_settings(model)
    tiers = _tiers(settings, factors)
    last = tiers[-1]
    check_fit(settings, tiers, decoder(model))
    if last.target_length <= settings.original_length:
        raise ValueError(
            "factors: expected a target_length beyond the model's window of "
            f"{settings.original_length} tokens, got {last.target_length}"
        )
    if last.original_length not in (settings.original_length, settings.loaded_length):
        warn(
            f"the factors are for an original length of {last.original_length} tokens, and the "
            f"model's is {settings.original_length}",
        )
    if last.per_head:
        warn(
            "layers or heads have factors of their own, and readers know one set for all: the "
            f"export holds {set_for_readers(last)}; longrope.load gives back the tiers",
        )
    plan = Plan(settings, tiers, *_two(settings, last.one_set(), short), last.start_tokens)
    check_windows(decoder(model), plan.rule)
    if last.start_tokens and not switch("drop_start_tokens", drop_start_tokens):
        raise ValueError(
            "drop_start_tokens: expected True for factors with start tokens, which no reader of "
            f"exports knows, got False and {last.start_tokens} start tokens"
        )
    if plan.crosses:
        warn(
            f"a reader changes the factors of all tokens when a sequence grows beyond "
            f"{plan.window} tokens, and keys cached before are wrong then (vLLM keeps one set, by "
            'its max_model_len); short="long" has no such crossing',
        )
    return plan


def set_for_readers(factors: RescaleFactors) -> str:
    """Say which one set stands for factors by layer and head, and what it costs where measured."""
    if factors.shared is None:
        return (
            "their mean, which was never measured and can be worse than what a search for all "
            "heads alike finds (longrope.measure_export says)"
        )
    cost = factors.shared.cost
    return "the set that their search began with" + f", {cost}" * bool(cost)


def _tiers(settings: RopeSettings, factors: Any) -> Tiers:
    """Return the tiers by position of what the caller gave: a ladder to a single set."""
    if isinstance(factors, Tiers) and len(factors) > 1:
        return factors
    last = factors[0] if isinstance(factors, Tiers) else factors
    if not isinstance(last, RescaleFactors):
        raise TypeError(f"factors: expected RescaleFactors or Tiers, got {type(factors).__name__}")
    loaded = settings.loaded
    same = loaded is not None and all(
        getattr(last, name) == getattr(loaded, name) for name in ("rope_theta", "rotary_dim")
    )
    if not same or last.target_length <= loaded.target_length:
        return Tiers([last])
    if np.isfinite(last.lambdas).all() and np.isfinite(loaded.lambdas).all():
        return last.ladder(loaded=loaded)
    return Tiers([loaded, last])


def _two(
    settings: RopeSettings, last: RescaleFactors, short: str | RescaleFactors
) -> tuple[RescaleFactors, RescaleFactors, str]:
    """Return the short factors, the long ones, and what `short` asked for."""
    long = last.replace(start_tokens=0)
    if isinstance(short, RescaleFactors):
        found, choice = short.one_set(), "factors"
        check_fit(settings, Tiers([short]))
    elif short == "long":
        found, choice = long.replace(target_length=settings.original_length), "long"
    elif short == "none":
        found, choice = settings.loaded, "none"
        if found is None:
            raise ValueError(
                'short: expected "long" or factors for a model whose own scaling depends on the '
                f'length ("{settings.rope_type}"), got "none"'
            )
    else:
        raise ValueError(f'short: expected "long", "none" or RescaleFactors, got {short!r}')
    if found.target_length >= long.target_length:
        raise ValueError(
            f"short: expected a target_length below that of factors, {long.target_length}, got "
            f"{found.target_length}"
        )
    if found.start_tokens:
        raise ValueError(f"short: expected no start tokens, got {found.start_tokens}")
    return found.replace(attention_factor=long.attention_factor), long, choice
