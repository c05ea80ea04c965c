"""Linear cross-entropy: the negative log-likelihood of tokens without a tensor of their logits.

The logits of a model, `hidden @ weight.T`, are by far its largest activation: `[T, V]` with a
vocabulary of up to 256k. Here they exist only as small tiles inside the kernel; see
`csrc/perplexity/perplexity.h`, and `longrope.ops.reference.perplexity` for the specification in
plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longrope import _native  # noqa: F401  (registers torch.ops.longrope)
from longrope.ops._arguments import as_autocast, expect
from longrope.ops._fake import perplexity as _fakes  # noqa: F401  (registers them)
from longrope.ops._forward_mode import push_forward, refuse_tangents

__all__ = ["candidate_sums", "linear_nll"]


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """Return the negative log-likelihood, in nats, of each row's target token.

    In plain torch: `F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none",
    ignore_index=ignore_index)`. Logits are accumulated, kept and summed in float32 for every dtype;
    memory is `O(T E)` and no `[T, V]` tensor exists, neither here nor in the backward, which
    computes the logits again. On a CPU rows that are ignored cost nothing. Under `torch.autocast`
    hidden and weight are taken in its dtype, as by `F.linear`; the result is float32 as ever.

    Where hidden asks for a gradient and weight does not, the forward computes that
    gradient with the loss, for an upstream gradient of 1, and keeps it in place of hidden (`[T, E]`
    of its dtype): two matrix products, since the backward only scales. Of float16 what is below
    6e-8 of an upstream gradient of 1 is lost there, before a loss scale can save it. Where no
    backward will come, `torch.no_grad()` saves the second product.

    Parameters
    ----------
    hidden : float32, bfloat16, float16 (CPU also float64) `[T, E]`
        Hidden states before the head, any strides. `hidden[t]` predicts `targets[t]`: shifting by
        one token is the caller's.
    weight : the dtype of hidden, `[V, E]`
        The head, any strides.
    targets : int64 `[T]`
        Token ids in `[0, V)`, or `ignore_index`.
    ignore_index : int
        Rows with this target give 0 and no gradient, whatever their hidden state.
    softcap : float, optional
        Logits become `softcap * tanh(logits / softcap)` (Gemma 2: 30).

    Returns
    -------
    float32 `[T]` (float64 for float64)
        Differentiable in hidden and weight, once.

    Raises
    ------
    ValueError
        Where a shape, dtype or device is not as above, and on CPU where a target is out of range
        (on CUDA its row is NaN).
    NotImplementedError
        Where hidden or weight has a forward-mode tangent (`torch.func.jvp`), or a second derivative
        is asked for.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        expect(isinstance(tensor, Tensor), name, "a tensor", type(tensor))
    refuse_tangents("linear_nll", hidden=hidden, weight=weight)
    hidden, weight = as_autocast(hidden), as_autocast(weight)
    frozen_head = (
        torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad
        and hidden.dim() == 2
    )  # fmt: skip
    if frozen_head:
        edge = hidden[:0].clone()
        return torch.ops.longrope.linear_nll_with_gradient(
            hidden, weight, targets, edge, ignore_index, softcap
        )[0]
    return torch.ops.longrope.linear_nll(hidden, weight, targets, ignore_index, softcap)[0]


def candidate_sums(
    nll: Tensor, targets: Tensor, candidate: Tensor, candidates: int, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Return the sum of `linear_nll` and the number of scored rows, for each candidate.

    For the evaluation of a whole population in one batch: the rows of all candidates come together
    and the results stay on the device. `(nll_sum / count).exp()` is each candidate's perplexity.
    In plain torch: `zeros(candidates).index_add(0, candidate, nll.double())`, which has no fixed
    order on a GPU.

    Parameters
    ----------
    nll : float32 (CPU also float64) `[T]`
        What `linear_nll` returned.
    targets : int64 `[T]`
        Its targets: rows of `ignore_index` count nowhere.
    candidate : int64 `[T]`
        Which candidate each row belongs to, in `[0, candidates)`, in any order.
    candidates : int
        How many there are; one without rows has sum 0 and count 0.
    ignore_index : int
        As for `linear_nll`.

    Returns
    -------
    nll_sum : float64 `[candidates]`
        Rows are added in float64, in a fixed order: the result does not depend on the number of
        threads beyond the rounding of each row. Differentiable in nll, in forward mode too.
    count : int64 `[candidates]`
        Rows that are not ignored.

    Raises
    ------
    ValueError
        Where a shape, dtype or device is not as above, and on CPU where a candidate is out of range
        (on CUDA it counts nowhere).
    """
    rest = (targets, candidate, candidates, ignore_index)
    return push_forward(
        lambda nll: torch.ops.longrope.candidate_sums(nll, *rest),
        lambda _, moves: (torch.ops.longrope.candidate_sums(*moves, *rest)[0], None),
        nll,
    )


def _nll_setup(ctx, inputs, output):
    hidden, weight, targets, ctx.ignore_index, ctx.softcap = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _nll_backward(ctx, grad_nll, _grad_stats):
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = torch.ops.longrope.linear_nll_backward(
        grad_nll, *ctx.saved_tensors, ctx.ignore_index, ctx.softcap, need_hidden, need_weight
    )
    return (
        grad_hidden if need_hidden else None, grad_weight if need_weight else None, None, None, None
    )  # fmt: skip


torch.library.register_autograd("longrope::linear_nll", _nll_backward, setup_context=_nll_setup)


def _frozen_setup(ctx, inputs, output):
    _, _, targets, edge, ctx.ignore_index, _ = inputs
    # Neither hidden nor weight: the gradient takes the place of hidden in memory.
    ctx.save_for_backward(output[1], targets, edge)
    ctx.mark_non_differentiable(output[1])


def _frozen_backward(ctx, grad_nll, _grad_gradient):
    grad = torch.ops.longrope.linear_nll_scale(grad_nll, *ctx.saved_tensors, ctx.ignore_index)
    return grad, *[None] * 5


torch.library.register_autograd(
    "longrope::linear_nll_with_gradient", _frozen_backward, setup_context=_frozen_setup
)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("linear_nll: no second derivative")


for _backward in ("linear_nll_backward", "linear_nll_scale"):
    torch.library.register_autograd(f"longrope::{_backward}", _no_second_derivative)


def _sums_setup(ctx, inputs, output):
    nll, targets, candidate, _, ctx.ignore_index = inputs
    ctx.dtype = nll.dtype
    ctx.save_for_backward(targets, candidate)
    ctx.mark_non_differentiable(output[1])


def _sums_backward(ctx, grad_sums, _grad_counts):
    targets, candidate = ctx.saved_tensors
    grad = grad_sums.to(ctx.dtype)[candidate]
    return grad.masked_fill(targets == ctx.ignore_index, 0.0), None, None, None, None


torch.library.register_autograd(
    "longrope::candidate_sums", _sums_backward, setup_context=_sums_setup
)
