"""The ledger: every evaluation of a search in order, kept in a journal where there is one."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from longrope.factor_search.differentiation import LossGradient
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.evolution import Proposal
from longrope.factor_search.gradient import Point
from longrope.factor_search.journal import JournalError, Replay
from longrope.factor_search.ranks import Ranks
from longrope.factor_search.space import Candidate

#: The origins of factors that need no search: a model that fails with them is at fault.
BASELINES = ("pi", "ntk", "yarn")


class OutOfBudgetError(Exception):
    """Raised before an evaluation that the budget does not allow; the search ends there."""


@dataclass(frozen=True)
class Evaluation:
    """One measured candidate, or one step of a descent.

    Attributes
    ----------
    role
        Which windows: `"screen"` (the first few search windows), `"search"`, `"validation"`, or
        `"gradient"` for a step on random windows, where the gradient was computed too.
    iteration
        The generation or the number of the step; -1 at the end of a search.
    origin
        Where the candidate came from: `"pi"`, `"ntk"`, `"yarn"`, `"ramp"`, `"mutation"`,
        `"crossover"`, `"gradient"`, `"start tokens"`, or for validation `"start"`, `"finalist"`.
    lambdas, start_tokens, attention_factor
        The factors that were measured; on the grid except in a step.
    nll
        Mean negative log-likelihood in nats per token; infinite where the model's output was not
        finite.
    windows
        How many windows were measured.
    """

    role: str
    iteration: int
    origin: str
    lambdas: tuple[float, ...]
    start_tokens: int
    nll: float
    attention_factor: float
    windows: int

    @property
    def perplexity(self) -> float:
        """`exp(nll)`."""
        return math.exp(self.nll) if self.nll < 700 else math.inf  # exp overflows above 709

    @property
    def forward_equivalents(self) -> int:
        """The cost in forward passes of one window; a backward pass counts 2."""
        return self.windows * (3 if self.role == "gradient" else 1)


class Ledger:
    """Measures proposals in batches, or takes them from the journal of an interrupted run.

    Parameters
    ----------
    evaluator
        Measures candidates on windows.
    windows
        int64 `[S, N]` by role.
    journal
        None: nothing is kept on disk.
    max_evaluations
        Limit of the role `"search"`; None for no limit.
    on_batch
        Called with the new evaluations after every batch.
    differentiate
        Returns the loss and its gradient, for `step`.
    ranks
        Who share the batches of `measure`: batch `b` of a round is measured by rank `b`.
    """

    def __init__(
        self,
        evaluator: PopulationEvaluator,
        windows: dict[str, torch.Tensor],
        journal: Replay | None = None,
        *,
        max_evaluations: int | None = None,
        on_batch: Callable[[Sequence[Evaluation]], None] = lambda evaluations: None,
        differentiate: LossGradient | None = None,
        ranks: Ranks | None = None,
    ):
        self.evaluator = evaluator
        self.windows = windows
        self.journal = journal
        self.max_evaluations = sys.maxsize if max_evaluations is None else max_evaluations
        self.on_batch = on_batch
        self.differentiate = differentiate
        self.ranks = ranks or Ranks()
        self.history: list[Evaluation] = []
        #: Losses of the next batches, which other ranks measured in the same round.
        self._ahead: list[list[float]] = []
        self._losses: dict[str, dict[Candidate, float]] = {role: {} for role in windows}

    def losses(self, role: str) -> dict[Candidate, float]:
        """Return the NLL of every candidate measured in this role, in the order of measuring."""
        return dict(self._losses[role])

    def measure_within_budget(self, proposals: Sequence[Proposal]) -> list[float]:
        """As `measure` on the search windows, of which `max_evaluations` candidates are allowed.

        Raises `OutOfBudgetError` after the last one of them where there are more.
        """
        room = self.max_evaluations - len(self._losses["search"])
        losses = self.measure(proposals[: max(room, 0)])
        if room < len(proposals):
            raise OutOfBudgetError
        return losses

    def measure(self, proposals: Sequence[Proposal], role: str = "search") -> list[float]:
        """Return the NLL of each proposal; a batch is in the journal before the next one starts."""
        size = self.evaluator.candidates_per_batch(self.windows[role])
        batches = [proposals[start : start + size] for start in range(0, len(proposals), size)]
        losses = []
        for number in range(len(batches)):
            losses += self._measure_batch(batches[number : number + self.ranks.size], role)
        return losses

    def step(
        self, point: Point, iteration: int, start_tokens: int, windows: torch.Tensor
    ) -> tuple[float, np.ndarray]:
        """Return the NLL and the gradient at a point; they are in the journal before it returns.

        Raises `ValueError` where they are not finite.
        """
        asked = {
            "role": "gradient",
            "iteration": iteration,
            "lambdas": point.lambdas.tolist(),
            "start_tokens": start_tokens,
            "attention_factor": point.attention_factor,
        }
        entry = self._replay_step(asked)
        if entry is None:
            nll, gradient = self.differentiate(point, start_tokens, windows)
            if not (math.isfinite(nll) and np.isfinite(gradient).all()):
                raise ValueError(
                    f"model: its mean NLL at {windows.shape[1]} tokens, or the gradient, is not "
                    f"finite in step {iteration} (NLL {nll})"
                )
            entry = {**asked, "nll": nll, "gradient": gradient.tolist()}
            if self.journal is not None:
                self.journal.append([entry])
        done = Evaluation(
            "gradient", iteration, "gradient", tuple(entry["lambdas"]), start_tokens, entry["nll"],
            point.attention_factor, len(windows),
        )  # fmt: skip
        self.history.append(done)
        self.on_batch([done])
        return entry["nll"], np.array(entry["gradient"])

    def _replay_step(self, asked: dict) -> dict | None:
        entries = [] if self.journal is None else self.journal.peek(1)
        if not entries:
            return None
        if {**entries[0], "nll": None, "gradient": None} != {
            **asked,
            "nll": None,
            "gradient": None,
        }:
            raise self._does_not_follow()
        self.journal.skip(1)
        return entries[0]

    def _does_not_follow(self) -> JournalError:
        return JournalError(
            f"out: {self.journal.path} does not follow from its settings with this "
            "version of longrope; choose another folder, or resume=False to start again"
        )

    def _measure_batch(self, batches: Sequence[Sequence[Proposal]], role: str) -> list[float]:
        """Return the losses of the first of `batches`; the others make up the round."""
        batch = batches[0]
        losses = self._replay(batch, role)
        if losses is None:
            if not self._ahead:
                self._ahead = self.ranks.share(
                    [functools.partial(self._evaluate, batch, role) for batch in batches]
                )
            losses = self._ahead.pop(0)
            for proposal, loss in zip(batch, losses, strict=True):
                if not math.isfinite(loss) and proposal.origin in BASELINES:
                    raise ValueError(
                        f"model: its mean NLL at {self.windows[role].shape[1]} tokens is {loss} "
                        f"with the factors {proposal.origin!r}"
                    )
            losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
            if self.journal is not None:
                self.journal.append(
                    [_entry(p, role, loss) for p, loss in zip(batch, losses, strict=True)]
                )
        done = [
            Evaluation(
                role,
                p.iteration,
                p.origin,
                p.candidate.lambdas,
                p.candidate.start_tokens,
                loss,
                self.evaluator.to_factors(p.candidate).attention_factor,
                len(self.windows[role]),
            )
            for p, loss in zip(batch, losses, strict=True)
        ]
        self.history += done
        self._losses[role].update(zip((p.candidate for p in batch), losses, strict=True))
        self.on_batch(done)
        return losses

    def _evaluate(self, batch: Sequence[Proposal], role: str) -> list[float]:
        return self.evaluator([p.candidate for p in batch], self.windows[role])

    def _replay(self, batch: Sequence[Proposal], role: str) -> list[float] | None:
        """Take a whole batch from the journal; None: measure it (an incomplete one is redone)."""
        if self.journal is None:
            return None
        entries = self.journal.peek(len(batch))
        if role == "validation" and entries and entries[0].get("role") == "search":
            raise JournalError(
                f"out: {self.journal.path} holds more evaluations than this budget allows; "
                "give at least the earlier run's, or choose another folder"
            )
        # A finished run that goes on with a larger budget validates again at its new end.
        entries = [entry for entry in entries if entry.get("role") == role]
        if len(entries) < len(batch):
            return None
        for entry, proposal in zip(entries, batch, strict=True):
            if {**entry, "nll": None} != _entry(proposal, role, math.inf):
                raise self._does_not_follow()
        self.journal.skip(len(batch))
        return [math.inf if entry["nll"] is None else entry["nll"] for entry in entries]


def _entry(proposal: Proposal, role: str, loss: float) -> dict:
    return {
        "role": role,
        "iteration": proposal.iteration,
        "origin": proposal.origin,
        "hundredths": list(proposal.candidate.hundredths),
        "start_tokens": proposal.candidate.start_tokens,
        "attention_factor": proposal.candidate.attention_factor,
        "nll": loss if math.isfinite(loss) else None,
    }
