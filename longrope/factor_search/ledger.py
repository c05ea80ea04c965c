"""The ledger: every evaluation of a search in order, kept in a journal where there is one."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch

from longrope.distributed.ranks import Ranks
from longrope.errors import JournalError
from longrope.factor_search.descent import Point
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.evolution import Proposal
from longrope.factor_search.gradient import LossGradient
from longrope.factor_search.history import BASELINES, Evaluation
from longrope.factor_search.racing import BLOCKS, Stage
from longrope.factor_search.space import Candidate
from longrope.factor_search.windows import scored_tokens
from longrope.runs.journal import Replay

#: What a journal's entry holds beyond what was asked for.
_MEASURED = ("nll", "gradient", "block_sums")


class OutOfBudgetError(Exception):
    """Raised before an evaluation that the budget does not allow; the search ends there."""


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
        Limit of the candidates in the roles `"search"` and `"race"`; None for no limit.
    on_batch
        Called after every batch with the new evaluations, and the tokens that were measured for
        them: none where they came from the journal.
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
        on_batch: Callable[[Sequence[Evaluation], int], None] = lambda evaluations, tokens: None,
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
        #: Of the candidates in a race, over the windows so far: float64 `[S, blocks]`.
        self.block_sums: dict[Candidate, np.ndarray] = {}
        #: Values of the next batches, which other ranks measured in the same round.
        self._ahead: list[list[dict]] = []
        self._spent = 0  # of max_evaluations
        self._losses: dict[str, dict[Candidate, float]] = {role: {} for role in [*windows, "race"]}

    def losses(self, role: str) -> dict[Candidate, float]:
        """Return the NLL of every candidate measured in this role, in the order of measuring."""
        return dict(self._losses[role])

    def measure_within_budget(
        self,
        proposals: Sequence[Proposal],
        measure: Callable[[Sequence[Proposal]], list[float]] | None = None,
    ) -> list[float]:
        """As `measure` on the search windows, of which `max_evaluations` candidates are allowed.

        `measure` may be a `Race` instead. Raises `OutOfBudgetError` after the last candidate that
        is allowed where there are more.
        """
        room = self.max_evaluations - self._spent
        allowed = proposals[:room]
        losses = (measure or self.measure)(allowed)
        self._spent += len(allowed)
        if len(allowed) < len(proposals):
            raise OutOfBudgetError
        return losses

    def measure(self, proposals: Sequence[Proposal], role: str = "search") -> list[float]:
        """Return the NLL of each proposal; a batch is in the journal before the next one starts."""
        return self._measure(proposals, role, self.windows[role], None)

    def measure_stage(self, proposals: Sequence[Proposal], stage: Stage) -> list[float]:
        """As `measure` on the windows of a race's stage; the NLL is over all windows so far.

        That is the mean of the block sums in `block_sums`, added up by numpy in the order of the
        windows: with all windows the value of `measure`, up to rounding.
        """
        windows = self.windows["search"][stage.begin : stage.end]
        return self._measure(proposals, stage.role, windows, stage)

    def _measure(
        self,
        proposals: Sequence[Proposal],
        role: str,
        windows: torch.Tensor,
        stage: Stage | None,
    ) -> list[float]:
        size = self.evaluator.candidates_per_batch(windows)
        batches = [proposals[start : start + size] for start in range(0, len(proposals), size)]
        losses = []
        for number in range(len(batches)):
            these = batches[number : number + self.ranks.size]
            losses += self._measure_batch(these, role, windows, stage)
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
        replayed = self._replay([asked])
        entry = replayed[0] if replayed else None
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
        self.on_batch([done], 0 if replayed else windows.numel())
        return entry["nll"], np.array(entry["gradient"])

    def _measure_batch(
        self,
        batches: Sequence[Sequence[Proposal]],
        role: str,
        windows: torch.Tensor,
        stage: Stage | None,
    ) -> list[float]:
        """Return the losses of the first of `batches`; the others make up the round."""
        batch = batches[0]
        asked = [_asked(proposal, role, stage) for proposal in batch]
        replayed = self._replay(asked)
        entries = replayed
        if entries is None:
            if not self._ahead:
                self._ahead = self.ranks.share(
                    [functools.partial(self._evaluate, batch, windows, stage) for batch in batches]
                )
            measured = self._ahead.pop(0)
            for proposal, values in zip(batch, measured, strict=True):
                if not math.isfinite(values["nll"]):
                    if proposal.origin in BASELINES:
                        raise ValueError(
                            f"model: its mean NLL at {windows.shape[1]} tokens is {values['nll']} "
                            f"with the factors {proposal.origin!r}"
                        )
                    values.update(dict.fromkeys(values))  # JSON has no infinity
            entries = [{**a, **values} for a, values in zip(asked, measured, strict=True)]
            if self.journal is not None:
                self.journal.append(entries)
        losses = [math.inf if entry["nll"] is None else entry["nll"] for entry in entries]
        if stage is not None:
            for proposal, entry in zip(batch, entries, strict=True):
                self._keep_blocks(proposal.candidate, entry["block_sums"], stage)
        done = [
            Evaluation(
                role,
                p.iteration,
                p.origin,
                p.candidate.lambdas,
                p.candidate.start_tokens,
                loss,
                self.evaluator.to_factors(p.candidate).attention_factor,
                len(windows),
            )
            for p, loss in zip(batch, losses, strict=True)
        ]
        self.history += done
        self._losses[role].update(zip((p.candidate for p in batch), losses, strict=True))
        self.on_batch(done, 0 if replayed else windows.numel() * len(batch))
        return losses

    def _evaluate(
        self, batch: Sequence[Proposal], windows: torch.Tensor, stage: Stage | None
    ) -> list[dict]:
        """Return what the journal keeps: the NLL, and in a race the block sums of the stage.

        There the NLL is over all windows up to the end of the stage.
        """
        candidates = [p.candidate for p in batch]
        if stage is None:
            return [{"nll": loss} for loss in self.evaluator(candidates, windows)]
        scored = scored_tokens(windows, self.evaluator.last_tokens)
        sums, _ = self.evaluator.block_sums(candidates, windows, min(BLOCKS, scored))
        measured = []
        for candidate, added in zip(candidates, sums.numpy(), strict=True):
            so_far = np.concatenate([self.block_sums[candidate], added]) if stage.begin else added
            nll = float(so_far.sum()) / (stage.end * scored)
            measured.append({"nll": nll, "block_sums": added.tolist()})
        return measured

    def _keep_blocks(
        self, candidate: Candidate, added: list[list[float]] | None, stage: Stage
    ) -> None:
        if added is not None:
            earlier = [self.block_sums[candidate]] if stage.begin else []
            self.block_sums[candidate] = np.concatenate([*earlier, np.array(added)])

    def finish(self) -> None:
        """Raise `JournalError` where the journal goes on after what this search has asked for."""
        if self.journal is not None and self.journal.pending:
            raise self._too_many()

    def _too_many(self) -> JournalError:
        return JournalError(
            f"out: {self.journal.path} holds more evaluations than this budget allows; "
            "give at least the earlier run's, or choose another folder"
        )

    def _replay(self, asked: list[dict]) -> list[dict] | None:
        """Take a whole batch from the journal; None: measure it (an incomplete one is redone)."""
        entries = [] if self.journal is None else self.journal.peek(len(asked))
        if entries and _precedes(entries[0], asked[0]):
            raise self._too_many()
        if asked[0]["role"] != "gradient":
            # A finished run that goes on with a larger budget validates again at its new end, and
            # has more candidates in the stage of a race that the budget had ended.
            entries = [entry for entry in entries if _phase(entry) == _phase(asked[0])]
        if len(entries) < len(asked):
            return None
        for entry, expected in zip(entries, asked, strict=True):
            if {k: v for k, v in entry.items() if k not in _MEASURED} != expected:
                raise JournalError(
                    f"out: {self.journal.path} does not follow from its settings with this "
                    "version of longrope; choose another folder, or resume=False to start again"
                )
        self.journal.skip(len(asked))
        return entries


def _asked(proposal: Proposal, role: str, stage: Stage | None) -> dict:
    """Return what the journal says of a measurement beside its values."""
    candidate = proposal.candidate
    asked = {
        "role": role,
        "iteration": proposal.iteration,
        "origin": proposal.origin,
        "hundredths": list(candidate.hundredths),
        "start_tokens": candidate.start_tokens,
        "attention_factor": candidate.attention_factor,
    }
    if candidate.critical_pair is not None:
        asked["critical_pair"] = candidate.critical_pair
    if stage is not None:
        asked["windows"] = [stage.begin, stage.end]
    return asked


def _phase(entry: dict) -> tuple:
    return entry.get("role"), entry.get("windows")


def _precedes(entry: dict, asked: dict) -> bool:
    """Say whether an entry belongs to an evolution that was over, or in a later stage, by now."""
    if asked["role"] == "validation":
        return entry.get("role") in ("search", "race")
    same = entry.get("role") in ("search", "race") and entry.get("iteration") == asked["iteration"]
    return same and entry.get("windows", [0]) < asked.get("windows", [0])
