"""The specification of linear_nll and candidate_sums: all logits at once, float64, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longrope.ops._arguments import expect

__all__ = ["candidate_sums", "linear_nll"]


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """See `longrope.ops.linear_nll`. In float64, rounded once; gradients by autograd."""
    expect(hidden.dim() == 2 and hidden.is_floating_point(), "hidden", "[T, E]", hidden)
    expect(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[1] and weight.dtype == hidden.dtype,
        "weight", f"[V, {hidden.shape[1]}] of hidden's dtype", weight,
    )  # fmt: skip
    expect(
        targets.dtype == torch.int64 and targets.shape == hidden.shape[:1],
        "targets", f"int64 [{hidden.shape[0]}]", targets,
    )  # fmt: skip
    expect(softcap is None or 0 < softcap < float("inf"), "softcap", "a positive number", softcap)
    ignored = targets == ignore_index
    known = (targets >= 0) & (targets < weight.shape[0])
    expect(
        bool((ignored | known).all()), "targets",
        f"values in [0, {weight.shape[0]}) or ignore_index {ignore_index}",
        targets[~(ignored | known)].tolist(),
    )  # fmt: skip
    scored = hidden.masked_fill(ignored[:, None], 0.0)  # whatever stands there
    logits = scored.double() @ weight.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, targets, reduction="none", ignore_index=ignore_index)
    return nll if hidden.dtype == torch.float64 else nll.float()


def candidate_sums(
    nll: Tensor, targets: Tensor, candidate: Tensor, candidates: int, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """See `longrope.ops.candidate_sums`."""
    expect(
        candidate.dtype == torch.int64 and candidate.shape == targets.shape,
        "candidate", f"int64 [{targets.shape[0]}]", candidate,
    )  # fmt: skip
    known = (candidate >= 0) & (candidate < candidates)
    expect(
        bool(known.all()), "candidate", f"values in [0, {candidates})", candidate[~known].tolist()
    )
    scored = targets != ignore_index
    sums = torch.zeros(candidates, dtype=torch.float64, device=nll.device)
    counts = torch.zeros(candidates, dtype=torch.int64, device=nll.device)
    return (
        sums.index_add(0, candidate, nll.double().masked_fill(~scored, 0.0)),
        counts.index_add(0, candidate, scored.long()),
    )
