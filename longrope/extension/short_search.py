"""The search at one short length: starts, a descent, and a choice on held-out windows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope._numbers import from_json, to_json
from longrope.distributed.ranks import Ranks
from longrope.errors import NotFiniteError
from longrope.evaluation.identity import digests
from longrope.evaluation.memory import BackwardPlan, BatchPlan, plan_backward, plan_batches
from longrope.evaluation.perplexity import perplexity
from longrope.factor_search.descent import Descent, DescentSettings, Point
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.gradient import GradientEvaluator, expect_finite
from longrope.factor_search.history import Role
from longrope.factor_search.methods import ATTENTION_DIGITS
from longrope.factor_search.range_evaluator import RangeEvaluator, RangeGradient
from longrope.factor_search.windows import WindowsByRole
from longrope.factors import RescaleFactors, Tiers
from longrope.patching import apply, rope_settings
from longrope.patching.attention import has_kernel_attention
from longrope.report.recovery import KIND
from longrope.runs import folder
from longrope.runs.journal import Journal

#: Powers of the long set that a search begins with.
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Digits of lambdas: the grid of the search.
_LAMBDA_DIGITS = 2


@contextlib.contextmanager
def open_journal(
    out: Path, header: dict[str, Any], notes: dict[str, Any], documents: Sequence[torch.Tensor],
    results: Sequence[str], resume: bool,
) -> Iterator[Journal]:  # fmt: skip
    """Hold the journal of a recovery in `out`."""
    folder.prepare(out, KIND, results, resume)
    header = {**header, "documents": digests(documents)}
    with Journal(out / folder.JOURNAL, header, notes, kind=KIND) as journal:
        folder.write_config(out, {"options": header})
        yield journal


class ShortSearch:
    """Searches one set of factors for windows of a length; see `longrope.recover`.

    Parameters
    ----------
    model
        Its factors are changed on the way.
    documents
        1-D token ids, each as long as the longest window.
    had
        The tiers that the model has.
    bos
        The token in front of every window; None: none.
    steps, samples, max_lambda, seed
        As for `longrope.recover`.
    journal
        None: nothing is kept.
    """

    def __init__(
        self, model: nn.Module, documents: Sequence[torch.Tensor], had: Tiers, bos: int | None, *,
        steps: int, samples: int, max_lambda: float | None, seed: int, journal: Journal | None,
    ):  # fmt: skip
        self.model, self.documents, self.had, self.bos = model, documents, had, bos
        self.settings = DescentSettings(steps=steps)
        self.samples, self.seed, self.journal = samples, seed, journal
        finite = had[-1].lambdas[np.isfinite(had[-1].lambdas)]
        self.max_lambda = max_lambda or max(1.01, float(finite.max(initial=1.0)))
        self._drawn: dict[int, WindowsByRole] = {}

    def recorded(self, measure: Callable[[], Any]) -> Any:
        """Return what the journal holds next, or measure it and keep it there. JSON values."""
        if self.journal is not None and self.journal.pending:
            value = from_json(self.journal.pending[0]["value"])
            self.journal.skip(1)
            return value
        value = measure()
        if self.journal is not None:
            self.journal.append([{"value": to_json(value)}])
        return value

    def windows(self, length: int) -> WindowsByRole:
        """Return the windows of a length, by role."""
        if length not in self._drawn:
            randoms = [np.random.default_rng([self.seed, length, n]) for n in range(2)]
            self._drawn[length] = WindowsByRole.draw(
                self.model, self.documents, None, length, self.samples, *randoms, screened=2,
                bos=self.bos,
            )  # fmt: skip
        return self._drawn[length]

    def held_out(self, length: int) -> list[torch.Tensor]:
        """Return the windows that judge, or those of the search where there is too little text."""
        windows = self.windows(length).windows
        return list(windows.get(Role.VALIDATION, windows[Role.SEARCH]))

    def at(
        self, length: int, below: Tiers | None = None, more: Sequence[RescaleFactors] = ()
    ) -> RescaleFactors:
        """Return the best set for windows of a length, or for what is behind tiers `below`.

        `more` are starts beside the usual ones.
        """
        drawn = self.windows(length)
        evaluate, differentiate = self._evaluators(length, below)
        windows = drawn.windows[Role.SEARCH]
        starts = [*self._starts(length), *more]
        losses = self.recorded(lambda: _or_infinite(evaluate(starts, windows)))
        least, best = min(zip(losses, starts, strict=True), key=lambda pair: pair[0])
        if least == math.inf:
            raise NotFiniteError(
                f"model: its mean NLL at {length} tokens is not finite under any of the "
                f"{len(starts)} sets of factors that the search begins with"
            )
        settings = rope_settings(self.model)
        base = best.base_inv_freq()
        random = drawn.random(np.random.default_rng([self.seed, length, 2]))
        turns = settings.original_length * base / (2 * np.pi)
        lambdas = np.clip(best.lambdas, 1, self.max_lambda)
        point = Point(np.log(lambdas), best.attention_factor)
        descent = Descent(
            1 / np.maximum(1, turns), self.max_lambda, self.settings, best.attention_factor, True
        )

        def loss_and_gradient(at: Point, step: int) -> tuple[float, np.ndarray]:
            drawn_now = random.draw(1)

            def measure() -> list[Any]:
                loss, gradient = differentiate(at, 0, drawn_now)
                expect_finite(loss, gradient, length, step)
                return [loss, gradient.tolist()]

            loss, gradient = self.recorded(measure)
            return loss, np.array(gradient)

        def rounded(found: Point) -> RescaleFactors:
            return best.replace(
                lambdas=np.round(found.lambdas, _LAMBDA_DIGITS),
                attention_factor=round(found.attention_factor, ATTENTION_DIGITS),
            )

        def loss_of(factors: RescaleFactors, steps: int) -> float:
            return self.recorded(lambda: _or_infinite(evaluate([factors], windows))[0])

        better = descent.halting(point, loss_and_gradient, rounded, loss_of, least)
        return better[-1][0] if better else best

    def better_tier(
        self, below: Sequence[RescaleFactors], found: RescaleFactors, begin: int, length: int
    ) -> list[RescaleFactors]:
        """Return the tiers for positions `begin` to before `length`, behind the tiers `below`.

        Those that were there; else one: the model as loaded, what was found for whole windows, or
        what a search of the range alone makes of it. Held-out windows decide, by the tokens of the
        range.
        """
        ways = [[found]]
        # The last token of a range predicts none, and one must be left.
        if below and length - begin > 2 and has_kernel_attention(self.model):
            ways.append([self.at(length, Tiers(below), [found])])
        as_it_was = [t for t in self.had if begin < t.target_length <= length]
        if not as_it_was or as_it_was[-1].target_length < length:
            next_one = next(t for t in self.had if t.target_length > length)
            as_it_was.append(next_one.replace(target_length=length))
        loaded = self._loaded(length)
        ways = [as_it_was, [loaded], *ways]
        beyond = [t for t in self.had if t.target_length > length]

        def measure() -> list[float]:
            losses = []
            for way in ways:
                apply(self.model, Tiers([*below, *way, *beyond]))
                try:
                    ppl = perplexity(
                        self.model, self.held_out(length), length=length, stride=length,
                        bos=False if self.bos is None else self.bos, ranges=[(begin, length)],
                    )  # fmt: skip
                except NotFiniteError:
                    losses.append(math.inf)
                else:
                    losses.append(ppl.by_range[0])
            return losses

        losses = self.recorded(measure)
        return ways[int(np.argmin(losses))]

    def _evaluators(
        self, length: int, below: Tiers | None
    ) -> tuple[PopulationEvaluator, GradientEvaluator]:
        # What memory is free after a restart must not change the bits of later values.
        plans = self.recorded(
            lambda: [
                plan_batches(self.model, length, name="lengths"),
                plan_backward(self.model, length),
            ]
        )
        plan, backward = BatchPlan(*plans[0]), BackwardPlan(*plans[1])
        base = self.had[-1].base_inv_freq()
        if below is None:
            return (
                PopulationEvaluator(self.model, _itself, plan.rows, None, plan.chunk),
                GradientEvaluator(self.model, base, backward),
            )
        scored = length - below.limits[-1] - 1
        return (
            RangeEvaluator(self.model, _itself, plan.rows, scored, plan.chunk, below),
            RangeGradient(self.model, base, backward, scored, Ranks(), below, keep=False),
        )

    def _loaded(self, length: int) -> RescaleFactors:
        settings = rope_settings(self.model)
        if settings.loaded is None:
            return RescaleFactors.none(**settings.lengths(length))
        return settings.loaded.replace(target_length=length)

    def _starts(self, length: int) -> list[RescaleFactors]:
        """Return what a search begins with: the model as loaded, and what is within the bound."""
        long, loaded = self.had[-1], self._loaded(length)
        starts = [loaded]
        if np.isfinite(long.lambdas).all():
            starts += [
                loaded.replace(
                    lambdas=long.lambdas**power, attention_factor=long.attention_factor**power
                )
                for power in POWERS
            ]
        own = next(tier for tier in self.had if tier.target_length >= length)
        starts.append(own.replace(target_length=length, start_tokens=0))
        starts = [s.replace(original_length=loaded.original_length) for s in starts]
        within = [s for s in starts[1:] if s.lambdas.max() <= self.max_lambda]
        return list(dict.fromkeys([starts[0].replace(start_tokens=0), *within]))


def _or_infinite(losses: Sequence[float]) -> list[float]:
    """Return losses with infinity for what is not finite: no such set is ever the best."""
    return [loss if math.isfinite(loss) else math.inf for loss in losses]


def _itself(factors: RescaleFactors) -> RescaleFactors:
    """Return what the evaluator measures: candidates are factors already."""
    return factors
