"""What a search is about, and whether the model can take it: before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from longrope.evaluation.start import bos_token
from longrope.factor_search.ladder import Ladder
from longrope.factor_search.options import SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factor_search.stage import stage_of, tiers_as_found
from longrope.factors import Tiers
from longrope.patching import rope_settings
from longrope.patching.wrappers import is_quantized, is_sharded


@dataclass(frozen=True)
class Asked:
    """What a search is about.

    Attributes
    ----------
    options
        Its options.
    problem
        Of its target.
    ladder
        Its tiers; None: one set of factors.
    """

    options: SearchOptions
    problem: Problem
    ladder: Ladder | None


def asked(
    model: nn.Module,
    documents: Iterable[Any],
    options: SearchOptions,
    processes: int = 1,
    tiers: Tiers | None = None,
) -> Asked:
    """Return what a search on a model is about; nothing goes through the model.

    `processes` is the number of ranks; `tiers` are those that will be applied when it begins; None:
    the model is as it will be.

    Raises `ValueError` in one sentence where the model or the lengths do not allow it.
    """
    rope = rope_settings(model)
    bos = bos_token(options.bos, model, documents)
    original = options.original_length or rope.original_length
    found = tiers_as_found(model, rope, original, options.scaling, tiers)
    problem = Problem.of(rope, options, bos, stage_of(found))
    ladder = Ladder.of(model, rope, options, problem, found) if options.ladder else None
    options.check_ranks(processes)
    if processes > 1 and is_sharded(model):
        raise ValueError(
            "model: expected whole weights on every rank of the job, which measure different "
            "candidates at once, got weights that FSDP shares out"
        )
    if options.has_steps and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "model: expected parameters that were made outside torch.inference_mode(), "
            "got inference tensors, which take no part in gradients"
        )
    if options.has_steps and is_quantized(model):
        raise ValueError(
            "model: expected layers that gradients pass through, got torch's quantised ones; "
            'method="evolution" needs none'
        )
    return Asked(options, problem, ladder)
