"""Factors of their own for every layer, or every layer and head: a second descent.

It starts from what the search has found for all of them, tier after tier in a ladder, and one
backward pass gives the gradients of all. There are many more numbers than before and no more text,
so the descent's end is not taken as it is: between the shared factors and those of each head lie
mixtures, `shared^(1 - a) * own^a`, and the deciding windows say how far to go, or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope._numbers import perplexity_of
from longrope.errors import JournalError
from longrope.factor_search.descent import HeadDescent, Point
from longrope.factor_search.gradient import expect_finite
from longrope.factor_search.history import Evaluation, Role, SearchResult
from longrope.factor_search.methods import ATTENTION_DIGITS, Task
from longrope.factor_search.space import STEPS
from longrope.factors import RescaleFactors, Shared, Tiers
from longrope.patching.families import decoder
from longrope.patching.layers import layers_and_heads
from longrope.runs.journal import Replay

#: How far towards each head's own factors the mixtures go, in log lambda.
SHARES = (0.25, 0.5, 0.75)
#: Nats per token that factors for each head must gain on the deciding windows.
GAIN = 0.001
#: Digits of a lambda.
DIGITS = 4
#: The origins in the history: a point of the descent, and a mixture with the shared factors.
OWN, MIXED, SHARED = "heads", "heads, mixed", "heads, shared"


@dataclass(frozen=True)
class HeadSearch:
    """Searches the factors of layers or heads, from shared ones on; `run` is the search.

    Attributes
    ----------
    heads
        `(L, Hk)`: how many layers have factors of their own, and how many heads each.
    task_of
        Returns what a tier is searched with, behind the tiers below it: of one set, with none.
    tiers
        How many tiers are searched, the last of those that there are.
    forget
        Frees what a task keeps.
    """

    heads: tuple[int, int]
    task_of: Callable[[int, Tiers | None], Task]
    tiers: int = 1
    forget: Callable[[Task], None] = lambda task: None

    def run(self, shared: SearchResult) -> SearchResult:
        """Return the result with factors by layer and head, or `shared` where they gain nothing."""
        tiers = shared.tiers
        several = [shared.factors] if tiers is None else list(tiers)
        history: list[Evaluation] = []
        sums: dict[Role, list[float]] = {}
        scored: list[int] = []
        found = several[: len(several) - self.tiers]
        for number in range(1, self.tiers + 1):
            start = several[len(several) - self.tiers + number - 1]
            task = self.task_of(number, Tiers(found) if tiers is not None else None)
            rung = _Rung(self.heads, task, start, history)
            found.append(rung.search())
            for role, loss in rung.final(found[-1]).items():
                sums.setdefault(role, []).append(loss)
            scored.append(task.problem.last_tokens or 1)
            self.forget(task)
        task.measurer.finish()
        perplexity = {r: perplexity_of(np.average(s, weights=scored)) for r, s in sums.items()}
        result = dataclasses.replace(shared, history=(*shared.history, *history), shared=shared)
        held_out = perplexity.get(Role.VALIDATION)
        gains = (
            perplexity[Role.SEARCH] < shared.perplexity
            if held_out is None else held_out < shared.validation_perplexity
        )  # fmt: skip
        if not gains:  # tiers that gain for themselves can cost those above
            return result
        measured = (
            (shared.perplexity, perplexity[Role.SEARCH])
            if held_out is None else (shared.validation_perplexity, held_out)
        )  # fmt: skip
        if not all(map(math.isfinite, measured)):
            measured = None, None
        found = [
            own.replace(shared=Shared(start, *measured)) if start is not own and own.per_head
            else own for own, start in zip(found, several, strict=True)
        ]  # fmt: skip
        return dataclasses.replace(
            result,
            factors=found[-1],
            tiers=None if tiers is None else Tiers(found),
            perplexity=perplexity[Role.SEARCH],
            validation_perplexity=held_out,
            stages=task.problem.stage_parts(found[-1]),
        )


class _Rung:
    """One tier, or the one set there is."""

    def __init__(
        self,
        heads: tuple[int, int],
        task: Task,
        start: RescaleFactors,
        history: list[Evaluation],
    ):
        self.heads, self.task, self.start, self.history = heads, task, start, history
        self.measurer, self.problem = task.measurer, task.problem
        self._evaluate = self.measurer.evaluator
        self._losses: dict[tuple[Role, RescaleFactors], float] = {}

    def search(self) -> RescaleFactors:
        """Return the best of the shared factors, of points on the way down and of mixtures."""
        problem, settings = self.problem, self.task.options.descent
        layers, heads = self.heads
        unit, own = problem.unit_inv_freq(), self.start.inv_freq()
        turning = unit > 0
        if (turning != (own > 0)).any():
            return self.start  # no multiple of the stage below, whose stopped pairs turn in it
        log_lambdas = np.log(np.divide(unit, own, where=turning, out=np.ones(len(unit))))
        log_lambdas[~turning] = log_lambdas[turning].max(initial=0)  # which changes nothing
        origin = Point(
            np.broadcast_to(log_lambdas, (layers, heads, len(log_lambdas))),
            np.full((layers, heads), self.start.attention_factor),
        )
        descent = HeadDescent(
            1 / np.maximum(1, problem.turns()),
            problem.space.upper / STEPS,
            settings,
            self.start.attention_factor,
            problem.learn_attention,
            problem.space.least / STEPS,
        )
        shared = self.measure(self.task.judge, [self.start], SHARED)[0]
        judged = []

        def loss_of(factors: RescaleFactors, steps: int) -> float:
            judged.append(factors)
            return self.measure(self.task.judge, [factors], OWN, steps)[0]

        better = descent.halting(origin, self._loss_and_gradient, self._factors, loss_of, shared)
        chosen, least = better[-1] if better else (self.start, shared)
        own = chosen if better else judged[-1]
        mixtures = [self._mixed(own, share) for share in SHARES]
        for mixture, loss in zip(
            mixtures, self.measure(self.task.judge, mixtures, MIXED), strict=True
        ):
            if loss < least:
                chosen, least = mixture, loss
        return chosen if least <= shared - GAIN else self.start

    def final(self, chosen: RescaleFactors) -> dict[Role, float]:
        """Return the mean NLL of what was chosen, by the roles that a result speaks of."""
        roles = [r for r in (Role.SEARCH, Role.VALIDATION) if r in self.measurer.windows]
        return {role: self.measure(role, [chosen], OWN)[0] for role in roles}

    def _factors(self, point: Point) -> RescaleFactors:
        lambdas = np.round(self.problem.absolute(point.lambdas), DIGITS)
        return self.start.replace(
            lambdas=lambdas, attention_factor=np.round(point.attention_factor, ATTENTION_DIGITS)
        )

    def _mixed(self, own: RescaleFactors, share: float) -> RescaleFactors:
        start = self.start
        lambdas = start.lambdas ** (1 - share) * own.lambdas**share
        factors = start.attention_factor ** (1 - share) * own.attention_factor**share
        return own.replace(
            lambdas=np.round(lambdas, DIGITS), attention_factor=np.round(factors, ATTENTION_DIGITS)
        )

    def _loss_and_gradient(self, point: Point, step: int) -> tuple[float, np.ndarray]:
        windows = self.task.random_windows.draw(self.task.options.descent.windows_per_step)
        asked = {
            "role": Role.GRADIENT,
            "heads": list(self.heads),
            "iteration": step,
            "point": _digest(point.log_lambdas, point.attention_factor),
        }

        def compute() -> dict[str, Any]:
            start_tokens = self.start.start_tokens
            nll, gradient = self.measurer.differentiate(point, start_tokens, windows)
            expect_finite(nll, gradient, windows.shape[1], step, "the gradient by heads")
            return {"nll": nll, "gradient": gradient.tolist()}

        entry, replayed = self._journalled([asked], lambda: [compute()])
        factors = self._factors(point)
        self._note(Role.GRADIENT, step, OWN, factors, entry[0]["nll"], windows, replayed)
        return entry[0]["nll"], np.array(entry[0]["gradient"])

    def measure(
        self, role: Role, several: Sequence[RescaleFactors], origin: str, iteration: int = -1
    ) -> list[float]:
        """Return the mean NLL of factors on the windows of a role; none is measured twice."""
        windows = self.measurer.windows[role]
        fresh = [f for f in dict.fromkeys(several) if (role, f) not in self._losses]
        asked = [
            {"role": role, "heads": list(self.heads), "iteration": iteration, "origin": origin,
             "factors": _digest(f.lambdas, f.attention_factor)}
            for f in fresh
        ]  # fmt: skip

        def compute() -> list[dict[str, Any]]:
            size = self._evaluate.candidates_per_batch(windows)
            batches = [fresh[at : at + size] for at in range(0, len(fresh), size)]
            measured = self.measurer.ranks.share(
                [functools.partial(self._evaluate, batch, windows) for batch in batches]
            )
            return [{"nll": nll if math.isfinite(nll) else None} for b in measured for nll in b]

        if fresh:
            entries, replayed = self._journalled(asked, compute)
            for factors, entry in zip(fresh, entries, strict=True):
                nll = math.inf if entry["nll"] is None else entry["nll"]
                self._losses[role, factors] = nll
                self._note(role, iteration, origin, factors, nll, windows, replayed)
        return [self._losses[role, f] for f in several]

    def _journalled(
        self, asked: list[dict[str, Any]], compute: Callable[[], list[dict[str, Any]]]
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return what the journal of an earlier run has of this, or compute it and keep it there.

        And whether the journal had it.
        """
        journal = self.measurer.journal
        asked = [a | self.measurer.tier_of_entries for a in asked]
        entries = journal.peek(len(asked))
        if len(entries) < len(asked):
            entries = [{**a, **m} for a, m in zip(asked, compute(), strict=True)]
            journal.append(entries)
            return entries, False
        self.measurer.check_follows(entries, asked)
        journal.skip(len(asked))
        return entries, True

    def _note(
        self, role: Role, iteration: int, origin: str, factors: RescaleFactors, nll: float,
        windows: torch.Tensor, replayed: bool,
    ) -> None:  # fmt: skip
        """Add an evaluation to the history, with the mean of the factors."""
        mean = factors.mean()
        done = self.measurer.evaluation(
            role, iteration, origin, tuple(mean.lambdas.tolist()), mean.start_tokens, nll,
            mean.attention_factor, windows,
        )  # fmt: skip
        self.history.append(done)
        self.measurer.on_batch([done], 0 if replayed else windows.numel())


def heads_of(model: nn.Module, per: str) -> tuple[int, int]:
    """Return how many layers have factors of their own, and how many heads of each."""
    layers, heads = layers_and_heads(decoder(model))
    return layers, heads if per == "head" else 1


def check_goes_on(journal: Replay, model: nn.Module, per: str) -> None:
    """Raise `JournalError` where a journal has gone on from the shared factors in another way.

    That of a search for all layers and heads alike may go on in any.
    """
    begun = next((tuple(e["heads"]) for e in journal.pending if "heads" in e), None)
    if begun is None or (per != "model" and begun == heads_of(model, per)):
        return
    there = "layer" if begun[1] == 1 else "head"
    raise JournalError(
        f"out: {journal.path} is the journal of another search (per: {there!r} there, {per!r} "
        "here); choose another folder, or resume=False (--no-resume) to start again"
    )


def most_evaluations(options: Any, held_out: bool) -> int:
    """Return how many evaluations and steps there are at most in one tier."""
    if options.per == "model":
        return 0
    descent = options.descent
    return descent.steps + descent.checkpoints + len(SHARES) + 2 + held_out


def _digest(*arrays: Any) -> str:
    """Return a hash of the bits of numbers."""
    bits = b"".join(np.ascontiguousarray(a, dtype=np.float64).tobytes() for a in arrays)
    return hashlib.sha256(bits).hexdigest()[:16]
