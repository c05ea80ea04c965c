"""The model as loaded, beside what a search has found: with its own scaling or factors, if any."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longrope._warnings import warn
from longrope.distributed.ranks import Ranks
from longrope.evaluation.modes import evaluating
from longrope.evaluation.nll import NextTokenNLL
from longrope.evaluation.perplexity import may_be_cut
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.history import AS_LOADED, Evaluation, Role, SearchResult
from longrope.factor_search.sharded import ShardedEvaluator
from longrope.factor_search.windows import scored_tokens
from longrope.patching import rope_settings
from longrope.patching.attention import kernel_attention
from longrope.patching.families import decoder
from longrope.patching.mlp import inplace_mlps

_NAMES = {Role.SEARCH: "search", Role.VALIDATION: "held-out"}


def beside(
    result: SearchResult,
    model: nn.Module,
    evaluator: PopulationEvaluator,
    windows: Mapping[Role, Tensor],
    job: Ranks,
) -> SearchResult:
    """Return a result that has the model as loaded beside it, on the same windows `[S, N]`.

    Measured as it stands, after the search; its history has it too where the model has a scaling or
    factors of its own. Where the result is worse on the windows that decide, a warning says so.
    Nothing is measured where windows go through the model in pieces, which frequencies by the
    length of the whole ("dynamic") cannot follow.
    """
    applied, loaded = getattr(decoder(model).rotary_emb, "tiers", None), rope_settings(model).loaded
    # Of several tiers the last: at the target they reach farthest.
    last = loaded if applied is None else applied[-1].mean()
    dims = len(result.factors.lambdas)
    said = ((1.0,) * dims, 0, 1.0) if last is None else (
        tuple(last.lambdas.tolist()), last.start_tokens, last.attention_factor
    )  # fmt: skip
    measured = []
    for role in (role for role in _NAMES if role in windows):
        loss = _measure(model, evaluator, windows[role], job)
        if loss is None:
            return result
        loss = loss if math.isfinite(loss) else math.inf
        lambdas, start_tokens, factor = said
        count = len(windows[role])
        measured.append(Evaluation(role, -1, AS_LOADED, lambdas, start_tokens, loss, factor, count))
    if job.first:
        _compare(result, measured[-1])
    history = result.history
    if applied is not None or rope_settings(model).rope_type != "default":
        history = (*history, *measured)
    return dataclasses.replace(result, loaded=tuple(measured), history=history)


def _compare(result: SearchResult, loaded: Evaluation) -> None:
    """Warn where the result is worse than the model as loaded on the windows that decide."""
    found = result.perplexity
    if loaded.role == Role.VALIDATION and result.validation_perplexity is not None:
        found = result.validation_perplexity
    if loaded.perplexity < found:
        warn(
            f"the factors found are worse than the model as loaded on the {_NAMES[loaded.role]} "
            f"windows, perplexity {found:.4f} against {loaded.perplexity:.4f}: keep the model as "
            "it is, or search longer"
        )


def _measure(
    model: nn.Module, evaluator: PopulationEvaluator, windows: Tensor, job: Ranks
) -> float | None:
    """Return the mean NLL of windows, the same on all ranks; None where it cannot be measured."""
    applied, loaded = getattr(decoder(model).rotary_emb, "tiers", None), rope_settings(model).loaded
    if applied is not None:
        loaded = applied[0] if len(applied) == 1 else None  # one set cannot stand for several
    sharded = isinstance(evaluator, ShardedEvaluator)
    stands = not sharded and (evaluator.chunk is None or may_be_cut(model))
    if not stands and loaded is None:
        return None
    loss = math.nan
    if sharded or job.first:
        by_factors = copy.copy(evaluator)
        by_factors.to_factors = lambda factors: factors
        loss = _as_it_stands(model, evaluator, windows) if stands else (
            by_factors([loaded], windows)[0]
        )  # fmt: skip
    return loss if sharded else job.broadcast(loss)


def _as_it_stands(model: nn.Module, evaluator: PopulationEvaluator, windows: Tensor) -> float:
    scored = scored_tokens(windows, evaluator.last_tokens)
    with evaluating(model), kernel_attention(model), inplace_mlps(model):
        score = NextTokenNLL(model, evaluator.chunk)
        sums = [score.sums(part, scored).sum() for part in windows.split(evaluator.rows)]
        total = float(torch.stack(sums).sum())
    return total / (len(windows) * scored)
