"""Measuring: every evaluation of a search in order, taken from the journal or kept there."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from longrope.distributed.ranks import Ranks
from longrope.errors import JournalError
from longrope.factor_search.descent import Point
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.evolution import Proposal
from longrope.factor_search.gradient import GradientEvaluator, expect_finite
from longrope.factor_search.history import BASELINES, Evaluation, Role
from longrope.factor_search.racing import BLOCKS, Stage
from longrope.factor_search.space import Candidate
from longrope.factor_search.windows import scored_tokens
from longrope.runs.journal import Replay

#: What an entry of the journal holds of the result; the rest says what was measured.
_MEASURED = ("nll", "gradient", "block_sums")


class OutOfBudgetError(Exception):
    """Raised before an evaluation that the budget does not allow; the search ends there."""


class TierCost:
    """The cost of what is measured in a tier of a ladder, in forward passes of a whole window.

    Parameters
    ----------
    number
        Of the tier.
    prefix, end, target
        Tokens of a window before the range, up to its end, and of a window of the whole search.
    kept
        Whether the prefix of a window is computed once, not each time that it is measured on.
    """

    def __init__(self, number: int, prefix: int, end: int, target: int, kept: bool):
        self.number = number
        self._prefix, self._range, self._kept = prefix / target, (end - prefix) / target, kept
        #: The windows of steps, True, and of candidates, which keep prefixes of their own.
        self._seen: set[tuple[bool, bytes]] = set()

    def forget(self) -> None:
        """Take it that prefixes that were kept are no longer."""
        self._seen.clear()

    def of(self, windows: torch.Tensor, step: bool = False) -> float:
        """Return the cost of a candidate on windows, or of a step, whose way back counts twice.

        A window that was not seen before has its prefix computed.
        """
        new = {(step, window.numpy().tobytes()) for window in windows} - self._seen
        self._seen |= new if self._kept else set()
        return len(windows) * self._range * (3 if step else 1) + len(new) * self._prefix


class _On(NamedTuple):
    """What a measurement is made on: windows int64 `[S, N]`, in a race those of a stage."""

    role: Role
    windows: torch.Tensor
    stage: Stage | None = None


class Measurer:
    """Measures proposals in batches, or takes their values from the journal of an interrupted run.

    Parameters
    ----------
    evaluator
        Measures candidates on windows.
    windows
        int64 `[S, N]` by role.
    journal
        None: nothing is kept on disk.
    max_evaluations
        The most candidates that `measure_within_budget` measures; None: no limit.
    on_batch
        Called after every batch with the new evaluations, and the tokens that were measured for
        them: none where they came from the journal.
    differentiate
        Returns the loss and its gradient, for `step`.
    ranks
        The ranks that share the work of `measure`: batch `b` of a round is measured by rank `b`.
    absolute
        Makes lambdas that count from the base of those of a step.
    tier
        In a ladder the number of the tier, and the cost of what is measured in it.

    Attributes
    ----------
    history
        Every evaluation so far, in order.
    block_sums
        float64 `[S, blocks]` by candidate: the losses of those in a race, over the windows so far.
    """

    def __init__(
        self,
        evaluator: PopulationEvaluator,
        windows: dict[Role, torch.Tensor],
        journal: Replay | None = None,
        *,
        max_evaluations: int | None = None,
        on_batch: Callable[[Sequence[Evaluation], int], None] = lambda evaluations, tokens: None,
        differentiate: GradientEvaluator | None = None,
        ranks: Ranks | None = None,
        absolute: Callable[[np.ndarray], np.ndarray] = np.asarray,
        tier: TierCost | None = None,
    ):
        self.evaluator = evaluator
        self.windows = windows
        self.journal = journal or Replay(Path(), {}, [])
        self.max_evaluations = sys.maxsize if max_evaluations is None else max_evaluations
        self.on_batch = on_batch
        self.differentiate = differentiate
        self.ranks = ranks or Ranks()
        self.absolute = absolute
        self.tier = tier
        self.history: list[Evaluation] = []
        self.block_sums: dict[Candidate, np.ndarray] = {}
        #: Values of the next batches, which other ranks measured in the same round.
        self._ahead: list[list[dict]] = []
        self._spent = 0  # of max_evaluations
        self._losses: dict[Role, dict[Candidate, float]] = {role: {} for role in Role}

    def losses(self, role: Role) -> dict[Candidate, float]:
        """Return the NLL of every candidate measured in this role, in the order of measuring."""
        return dict(self._losses[role])

    def measure_within_budget(
        self,
        proposals: Sequence[Proposal],
        measure: Callable[[Sequence[Proposal]], list[float]] | None = None,
    ) -> list[float]:
        """As `measure` on the search windows, for `max_evaluations` candidates altogether.

        `measure` may be a `Race` instead. Where there are more candidates, raises
        `OutOfBudgetError` when the last that is allowed was measured.
        """
        allowed = proposals[: self.max_evaluations - self._spent]
        losses = (measure or self.measure)(allowed)
        self._spent += len(allowed)
        if len(allowed) < len(proposals):
            raise OutOfBudgetError
        return losses

    def measure(self, proposals: Sequence[Proposal], role: Role = Role.SEARCH) -> list[float]:
        """Return the NLL of each proposal; a batch is in the journal before the next one starts."""
        return self._measure(proposals, _On(role, self.windows[role]))

    def measure_stage(self, proposals: Sequence[Proposal], stage: Stage) -> list[float]:
        """As `measure` on the windows of a race's stage; the NLL is over all windows so far.

        It is the mean of the sums in `block_sums`, added up by numpy in the order of the windows:
        with all windows the value of `measure`, up to rounding.
        """
        windows = self.windows[Role.SEARCH][stage.start : stage.end]
        return self._measure(proposals, _On(stage.role, windows, stage))

    def _measure(self, proposals: Sequence[Proposal], on: _On) -> list[float]:
        size = self.evaluator.candidates_per_batch(on.windows)
        batches = [proposals[start : start + size] for start in range(0, len(proposals), size)]
        losses = []
        for number in range(len(batches)):
            losses += self._measure_batch(batches[number : number + self.ranks.size], on)
        return losses

    def step(
        self, point: Point, iteration: int, start_tokens: int, windows: torch.Tensor
    ) -> tuple[float, np.ndarray]:
        """Return the NLL and the gradient at a point; they are in the journal before it returns.

        Raises `NotFiniteError` where they are not finite.
        """
        asked = {
            "role": Role.GRADIENT,
            "iteration": iteration,
            "lambdas": point.lambdas.tolist(),
            "start_tokens": start_tokens,
            "attention_factor": point.attention_factor,
            **self.tier_of_entries,
        }
        replayed = self._replay([asked])
        entry = replayed[0] if replayed else None
        if entry is None:
            nll, gradient = self.differentiate(point, start_tokens, windows)
            expect_finite(nll, gradient, windows.shape[1], iteration)
            entry = {**asked, "nll": nll, "gradient": gradient.tolist()}
            self.journal.append([entry])
        lambdas, nll = tuple(self.absolute(np.array(entry["lambdas"])).tolist()), entry["nll"]
        done = self.evaluation(
            Role.GRADIENT, iteration, "gradient", lambdas, start_tokens, nll,
            point.attention_factor, windows,
        )  # fmt: skip
        self.history.append(done)
        self.on_batch([done], 0 if replayed else windows.numel())
        return nll, np.array(entry["gradient"])

    def _measure_batch(self, batches: Sequence[Sequence[Proposal]], on: _On) -> list[float]:
        """Return the losses of the first of `batches`; the others make up the round."""
        batch = batches[0]
        asked = [_asked(proposal, on) | self.tier_of_entries for proposal in batch]
        replayed = self._replay(asked)
        entries = replayed
        if entries is None:
            if not self._ahead:
                self._ahead = self.ranks.share(
                    [functools.partial(self._evaluate, batch, on) for batch in batches]
                )
            measured = self._ahead.pop(0)
            for proposal, values in zip(batch, measured, strict=True):
                if not math.isfinite(values["nll"]):
                    if proposal.origin in BASELINES:
                        raise ValueError(
                            f"model: its mean NLL at {on.windows.shape[1]} tokens is "
                            f"{values['nll']} with the factors {proposal.origin!r}"
                        )
                    values.update(dict.fromkeys(values))  # JSON has no infinity
            entries = [{**a, **values} for a, values in zip(asked, measured, strict=True)]
            self.journal.append(entries)
        losses = [math.inf if entry["nll"] is None else entry["nll"] for entry in entries]
        done = []
        for (candidate, origin, iteration), loss, entry in zip(batch, losses, entries, strict=True):
            factors = self.evaluator.to_factors(candidate)
            evaluation = self.evaluation(
                on.role, iteration, origin, tuple(factors.lambdas.tolist()),
                candidate.start_tokens, loss, factors.attention_factor, on.windows,
            )  # fmt: skip
            done.append(evaluation)
            self._losses[on.role][candidate] = loss
            if entry.get("block_sums"):
                added = np.array(entry["block_sums"])
                self.block_sums[candidate] = self._so_far(candidate, added, on.stage)
        self.history += done
        self.on_batch(done, 0 if replayed else on.windows.numel() * len(batch))
        return losses

    def _evaluate(self, batch: Sequence[Proposal], on: _On) -> list[dict]:
        """Return what the journal keeps: the NLL, and in a race the block sums of the stage.

        In a race the NLL is over all windows up to the end of the stage.
        """
        candidates = [p.candidate for p in batch]
        if on.stage is None:
            return [{"nll": loss} for loss in self.evaluator(candidates, on.windows)]
        scored = scored_tokens(on.windows, self.evaluator.last_tokens)
        sums, _ = self.evaluator.block_sums(candidates, on.windows, min(BLOCKS, scored))
        measured = []
        for candidate, added in zip(candidates, sums.numpy(), strict=True):
            so_far = self._so_far(candidate, added, on.stage)
            nll = float(so_far.sum()) / (on.stage.end * scored)
            measured.append({"nll": nll, "block_sums": added.tolist()})
        return measured

    def _so_far(self, candidate: Candidate, added: np.ndarray, stage: Stage) -> np.ndarray:
        """Return a candidate's block sums up to the end of a stage, which added these."""
        return np.concatenate([self.block_sums[candidate], added]) if stage.start else added

    def evaluation(
        self, role: Role, iteration: int, origin: str, lambdas: tuple[float, ...],
        start_tokens: int, nll: float, attention_factor: float, windows: torch.Tensor,
    ) -> Evaluation:  # fmt: skip
        """Return an entry of the history; in a ladder with its tier and what its range cost."""
        done = Evaluation(
            role, iteration, origin, lambdas, start_tokens, nll, attention_factor, len(windows)
        )
        if self.tier is None:
            return done
        passes = self.tier.of(windows, step=role == Role.GRADIENT)
        return dataclasses.replace(done, tier=self.tier.number, passes=passes)

    def check_follows(self, entries: Sequence[dict], asked: Sequence[dict]) -> None:
        """Raise `JournalError` where entries of the journal are not what this search asks for."""
        for entry, expected in zip(entries, asked, strict=True):
            if {k: v for k, v in entry.items() if k not in _MEASURED} != expected:
                raise JournalError(
                    f"out: {self.journal.path} does not follow from its settings with this "
                    "version of longrope; choose another folder, or resume=False to start again"
                )

    @property
    def tier_of_entries(self) -> dict[str, int]:
        return {} if self.tier is None else {"tier": self.tier.number}

    def finish(self) -> None:
        """Raise `JournalError` where the journal holds more than this search has asked for."""
        if self.journal.pending:
            raise self._too_many()

    def _too_many(self) -> JournalError:
        return JournalError(
            f"out: {self.journal.path} holds more evaluations than this budget allows; "
            "give at least the earlier run's, or choose another folder"
        )

    def _replay(self, asked: list[dict]) -> list[dict] | None:
        """Take a whole batch from the journal; None: measure it (an incomplete one is redone)."""
        entries = self.journal.peek(len(asked))
        if entries and _precedes(entries[0], asked[0]):
            raise self._too_many()
        if asked[0]["role"] != Role.GRADIENT:
            # A finished run that goes on with a larger budget validates again at its new end, and
            # has more candidates in the stage of a race that the smaller budget had cut short.
            entries = [entry for entry in entries if _phase(entry) == _phase(asked[0])]
        if len(entries) < len(asked):
            return None
        self.check_follows(entries, asked)
        self.journal.skip(len(asked))
        return entries


def _asked(proposal: Proposal, on: _On) -> dict:
    """Return what the journal says about a measurement, besides its result."""
    candidate = proposal.candidate
    asked = {
        "role": on.role,
        "iteration": proposal.iteration,
        "origin": proposal.origin,
        "hundredths": list(candidate.hundredths),
        "start_tokens": candidate.start_tokens,
        "attention_factor": candidate.attention_factor,
    }
    if candidate.critical_pair is not None:
        asked["critical_pair"] = candidate.critical_pair
    if candidate.from_base:
        asked["from_base"] = True
    if on.stage is not None:
        asked["windows"] = [on.stage.start, on.stage.end]
    return asked


def _phase(entry: dict) -> tuple:
    return entry.get("role"), entry.get("windows"), entry.get("tier")


def _precedes(entry: dict, asked: dict) -> bool:
    """Say whether an entry is of an evolution that is over, or at a later stage, in this search."""
    if entry.get("tier") != asked.get("tier"):
        return False
    evolving = entry.get("role") in (Role.SEARCH, Role.RACE)
    if asked["role"] == Role.VALIDATION:
        return evolving
    same = evolving and entry.get("iteration") == asked["iteration"]
    return same and entry.get("windows", [0]) < asked.get("windows", [0])
