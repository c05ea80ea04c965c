"""Whether every stage of a plan can begin, found before the first one does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from longrope.evaluation.start import bos_token
from longrope.extension.finetune import check_trainable, rows_of, trained_under
from longrope.extension.plan import FinetuneStage, Plan, RecoverStage, SearchStage, Stage
from longrope.extension.recover import check_recoverable
from longrope.factor_search.checks import Asked, asked
from longrope.factor_search.options import SearchOptions
from longrope.factors import RescaleFactors, Tiers
from longrope.patching.apply import check_windows
from longrope.patching.attention import check_tiered_attention
from longrope.patching.families import decoder

#: What works where tiers by position do not.
_WITHOUT = 'searches and fine-tuning with tiers="one" work'


def check_stages(
    model: nn.Module, plan: Plan, documents: Sequence[torch.Tensor], processes: int
) -> None:
    """Raise `ValueError` in one sentence where a stage could not begin, or not be measured."""
    for stage in plan.stages:
        if _by_position(stage):
            with _naming(stage):
                check_tiered_attention(decoder(model), _WITHOUT)
        if isinstance(stage, FinetuneStage):
            check_trainable(model, stage.config, processes)
            rows_of(model, documents, stage, bos_token(stage.config.bos, model, documents))
            continue
        length = stage.lengths[-1] if isinstance(stage, RecoverStage) else stage.length
        longest = max(map(len, documents), default=0)
        if longest < length:
            raise ValueError(
                f"documents: expected one of at least {length} tokens for stage {stage.name}, got "
                f"{len(documents)} documents, the longest {longest} tokens"
            )
    for _ in searches(model, plan, documents, processes):
        pass


def searches(
    model: nn.Module, plan: Plan, documents: Sequence[torch.Tensor], processes: int = 1
) -> Iterator[tuple[SearchStage, Asked]]:
    """Yield each search of a plan with what it is about, under the tiers that it will begin with.

    Whether a search can begin follows from the lengths of those tiers, not from their factors: PI
    stands for what is still to be found.
    """
    found: dict[str, Tiers] = {}
    trained = None
    for stage in plan.stages:
        if isinstance(stage, FinetuneStage):
            last = next(reversed(found))
            trained = trained_under(model, found[stage.factors or last], stage.config.tiers)
            if _by_position(stage):
                with _naming(stage):
                    check_windows(decoder(model), trained)
        elif isinstance(stage, RecoverStage):
            with _naming(stage):
                check_recoverable(model, next(reversed(found.values())), stage.lengths)
        if not isinstance(stage, SearchStage):
            continue
        options = SearchOptions(
            target_length=stage.length, ladder=stage.tiers == "position", **stage.options
        )
        with _naming(stage):
            about = asked(model, documents, options, processes, trained)
        yield stage, about
        fixed = about.ladder.fixed if about.ladder else ()
        problems = about.ladder.problems if about.ladder else (about.problem,)
        tiers = [RescaleFactors.pi(**problem.lengths) for problem in problems]
        found[stage.name] = Tiers([*fixed, *tiers])


@contextlib.contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    """Let refusals inside the block name the stage."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from None


def _by_position(stage: Stage) -> bool:
    """Say whether a stage leaves tiers by position, under which the model is measured after it."""
    if isinstance(stage, FinetuneStage):
        return stage.config.tiers != "one"
    return isinstance(stage, RecoverStage) or stage.tiers == "position"
