"""A function for each kind of stage: from the model and factors so far to what follows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longrope._numbers import to_json
from longrope.checkpoints.measured import Row
from longrope.distributed.ranks import Ranks
from longrope.documents.checks import like
from longrope.extension import checkpoint, folder
from longrope.extension.finetune import finetune, trained_under
from longrope.extension.plan import FinetuneStage, Plan, RecoverStage, SearchStage, Stage
from longrope.extension.recover import recover
from longrope.extension.table import measure
from longrope.factor_search.run import search
from longrope.factors import RescaleFactors, Tiers
from longrope.factors.tiers import ranges_of
from longrope.patching import apply, remove


@dataclass
class State:
    """What stages hand on.

    Attributes
    ----------
    model
        With the weights so far, and without factors.
    tiers
        The tiers so far; None: the model as loaded.
    trained
        Those that the weights were last trained under; None: the weights are the given ones.
    found
        The tiers of each search, by the name of its stage.
    """

    model: nn.Module
    tiers: Tiers | None = None
    trained: Tiers | None = None
    found: dict[str, Tiers] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What all stages of a run share.

    Attributes
    ----------
    plan
        The whole run.
    original
        The model as it was given; never changed.
    documents, held_out
        1-D token ids: for the stages, and for the table alone.
    out
        The folder of the run.
    progress
        Whether to show progress bars.
    job
        The ranks that run this together; the first writes files.
    """

    plan: Plan
    original: nn.Module
    documents: Sequence[torch.Tensor]
    held_out: Sequence[torch.Tensor]
    out: Path
    progress: bool
    job: Ranks = field(default_factory=Ranks)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The ranges of positions of the table."""
        return ranges_of(self.plan.window, self.plan.target_length)

    def folder(self, stage: Stage) -> Path:
        """Return the folder of a stage."""
        number = self.plan.stages.index(stage) + 1
        return self.out / folder.STAGES / f"{number:02}-{stage.name}"

    def rows_before(self, stage: FinetuneStage) -> int:
        """Return how many rows of text the stages before one of fine-tuning take."""
        before = self.plan.stages[: self.plan.stages.index(stage)]
        trained = [s.config for s in before if isinstance(s, FinetuneStage)]
        return sum(config.steps * config.batch_size for config in trained)

    def long_enough(self, length: int) -> Sequence[torch.Tensor]:
        """Return the documents of at least `length` tokens."""
        return like(self.documents, [d for d in self.documents if len(d) >= length])

    def table_row(self, name: str, model: nn.Module) -> Row:
        """Measure a model as it stands on what was held out."""
        return measure(name, model, self.held_out, self.ranges, bos=self.plan.bos)

    def measured(self, name: str, state: State) -> Row:
        """Measure the model and the tiers so far on what was held out."""
        return self.job.by_first(lambda: self._measured(name, state))

    def _measured(self, name: str, state: State) -> Row:
        if state.tiers is None:
            return self.table_row(name, state.model)
        apply(state.model, state.tiers)
        try:
            return self.table_row(name, state.model)
        finally:
            remove(state.model)


def run_stage(work: Work, stage: Stage, state: State) -> dict[str, Any]:
    """Run a stage, or what is left of it; `state` becomes what follows. Returns its entry."""
    place = work.folder(stage)
    entry: dict[str, Any] = {"stage": stage.name, "kind": stage.kind}
    if isinstance(stage, SearchStage):
        entry |= _search(work, stage, state, place)
    elif isinstance(stage, FinetuneStage):
        entry |= _finetune(work, stage, state, place)
    else:
        entry |= _recover(work, stage, state, place)
    work.job.by_first(lambda: state.tiers.save(place / folder.TIERS))
    return entry


def take_stage(work: Work, stage: Stage, state: State, weights: str | None) -> None:
    """Let `state` become what a finished stage left.

    `weights` is the hash of those that the stage ended with; None: a later stage replaced them.
    """
    place = work.folder(stage)
    state.tiers = folder.load_tiers(place / folder.TIERS)
    if isinstance(stage, SearchStage):
        state.found[stage.name] = state.tiers
    if isinstance(stage, FinetuneStage):
        state.trained = state.tiers
    if isinstance(stage, FinetuneStage) and weights is not None:
        _own_copy(work, state)
        folder.load_weights(state.model, place / folder.WEIGHTS)
        if folder.weights_hash(state.model) != weights:
            raise ValueError(
                f"out: {place / folder.WEIGHTS} does not hold the weights that stage {stage.name} "
                "ended with; choose another folder, or resume=False (--no-resume) to start again"
            )


def _search(work: Work, stage: SearchStage, state: State, place: Path) -> dict[str, Any]:
    if state.trained is not None:
        apply(state.model, state.trained)
    try:
        found = search(
            state.model,
            work.long_enough(stage.length),
            target_length=stage.length,
            ladder=stage.tiers == "position",
            out=place / "search",
            progress=work.progress,
            **stage.options,
        )
    finally:
        remove(state.model)
    state.tiers = state.found[stage.name] = found.tiers or Tiers([found.factors])
    return {
        "perplexity": to_json(found.perplexity),
        "validation_perplexity": to_json(found.validation_perplexity),
    }


def _finetune(work: Work, stage: FinetuneStage, state: State, place: Path) -> dict[str, Any]:
    last = next(reversed(state.found))
    tiers = state.found[stage.factors or last]
    _own_copy(work, state)
    weights = place / folder.WEIGHTS
    if work.job.by_first(weights.is_dir):  # trained, but killed before the journal said so
        folder.load_weights(state.model, weights)
    else:
        first = work.rows_before(stage)
        state.model = finetune(
            state.model, work.documents, tiers, stage, place, work.progress, first
        )
        work.job.by_first(lambda: folder.save_weights(state.model, weights))
    # The weights are safe: room for what follows.
    work.job.by_first(lambda: checkpoint.remove_all(place))
    state.tiers = state.trained = trained_under(state.model, tiers, stage.config.tiers)
    return {"weights": folder.weights_hash(state.model), "steps": stage.config.steps}


def _own_copy(work: Work, state: State) -> None:
    """Copy the given model before its weights change."""
    if state.model is work.original:
        state.model = copy.deepcopy(work.original).eval()  # as training leaves it


def _recover(work: Work, stage: RecoverStage, state: State, place: Path) -> dict[str, Any]:
    def found() -> tuple[Tiers, str]:
        apply(state.model, state.tiers)
        try:
            result = recover(
                state.model,
                work.long_enough(stage.lengths[-1]),
                lengths=stage.lengths,
                original=work.original,
                test=work.held_out,
                out=place / "search",
                **vars(stage.options),
            )
        finally:
            remove(state.model)
        return result.tiers, result.weights

    state.tiers, weights = work.job.by_first(found)
    return {"weights": weights}


def for_every_position(factors: RescaleFactors, window: int) -> Tiers:
    """Return one set of factors as two tiers, which an export keeps as they are."""
    return Tiers([factors.replace(target_length=window), factors])
