"""What programs that follow an export's one rule lose, measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from longrope.checkpoints import Measured, plan_export
from longrope.checkpoints.measured import Row
from longrope.documents import as_documents
from longrope.evaluation.modes import vocabulary
from longrope.evaluation.perplexity import Perplexity, perplexity
from longrope.factors import RescaleFactors, Tiers
from longrope.factors.tiers import ranges_of
from longrope.patching import apply, remove
from longrope.patching.apply import factors_kept
from longrope.patching.families import family_of


def measure_export(
    model: nn.Module,
    factors: RescaleFactors | Tiers,
    documents: Iterable[Any],
    *,
    short: str | RescaleFactors = "long",
    data: str = "",
) -> Measured:
    """Measure the perplexity by range of positions of an export's rule, and of what is beside it.

    The model as loaded; the rule of the export; with a crossing, also the rule on texts within
    the short window; with start tokens, also the rule with them, which says what leaving them out
    costs; and the tiers by position. Windows of the target length that do not overlap; ranges are
    the short window, then up to twice that, and so on.

    Parameters
    ----------
    model
        As for `longrope.export`. Factors that are applied to it are back in force afterwards.
    factors, short
        As for `longrope.export`.
    documents
        1-D token ids, each of at least the target length.
    data
        What the documents are, in words, for the card.

    Returns
    -------
    Measured
        For the argument `measured` of `longrope.export`; `print(measured.table())` shows it.

    Raises
    ------
    ValueError
        As `longrope.export` and `longrope.perplexity` do, start tokens apart.
    """
    plan = plan_export(model, factors, short, drop_start_tokens=True)
    length = plan.long.target_length
    tokens = as_documents(documents, min_length=length, vocab_size=vocabulary(model))
    ranges = ranges_of(plan.window, plan.long.target_length)

    def measure(name: str, of: Any = None, tiers: str = "position", window: int = length) -> Row:
        if of is None:
            remove(model)
        else:
            apply(model, of, tiers=tiers)
        inside = [pair for pair in ranges if pair[1] <= window]
        found = perplexity(model, tokens, length=window, stride=window, ranges=inside)
        scored.append(found)
        missing = (math.nan,) * (len(ranges) - len(inside))
        return Row(name, found.by_range + missing, math.nan if missing else float(found))

    scored: list[Perplexity] = []
    with factors_kept(model):
        rows = [
            measure("the model as loaded"),
            measure("**this export**, in any reader", plan.rule, "row"),
        ]
        if plan.crosses:
            name = f"this export, texts of at most {plan.window} tokens"
            rows.append(measure(name, plan.rule, "row", plan.window))
        if plan.start_tokens:
            name = f"this export, were its {plan.start_tokens} start tokens known to readers"
            rows.append(measure(name, plan.long.replace(start_tokens=plan.start_tokens)))
        rule = "position" if family_of(model).tiers else "row"
        rows.append(measure(f"longrope, tiers by {rule}", plan.tiers, rule))
    return Measured(length, ranges, tuple(rows), len(tokens), scored[0].tokens, data)
