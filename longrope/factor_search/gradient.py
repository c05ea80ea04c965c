"""The gradient of a model's loss with respect to rescale factors; its weights stay frozen."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longrope.distributed.ranks import Ranks
from longrope.errors import NotFiniteError
from longrope.evaluation.memory import WHOLE_WINDOWS, BackwardPlan
from longrope.evaluation.modes import evaluating
from longrope.evaluation.nll import NextTokenNLL
from longrope.factor_search.descent import Point
from longrope.factor_search.windows import scored_tokens
from longrope.patching import rows as rows_with_factors
from longrope.patching.attention import kernel_attention
from longrope.patching.families import decoder
from longrope.patching.wrappers import running_eagerly


class GradientEvaluator:
    """The mean NLL of windows at a point, and its gradient; the model is left as it was.

    Only the rotary frequencies and the attention factor carry gradients: the weights may be of any
    dtype, and no gradient of their size is kept. The frequencies are float64.

    Parameters
    ----------
    model
        A causal language model that `longrope.apply` supports.
    base_inv_freq
        The frequencies that lambdas divide, float64 `[dims]`.
    plan
        How windows go through the model (`longrope.evaluation.memory.plan_backward`).
    last_tokens
        Only the last tokens of each window are scored; None: all but the first.
    ranks
        The ranks that share the windows of a call: rank `w % ranks.size` measures window `w`.
    """

    def __init__(
        self,
        model: nn.Module,
        base_inv_freq: np.ndarray,
        plan: BackwardPlan = WHOLE_WINDOWS,
        last_tokens: int | None = None,
        ranks: Ranks | None = None,
    ):
        self.model = model
        self.last_tokens = last_tokens
        self.base_inv_freq = torch.from_numpy(base_inv_freq)
        self.plan = plan
        self.ranks = ranks or Ranks()
        with evaluating(model):
            self._score = NextTokenNLL(model, plan.chunk)

    def __call__(
        self, point: Point, start_tokens: int, windows: torch.Tensor
    ) -> tuple[float, np.ndarray]:
        """Return the mean NLL in nats and its gradient, float64 `[dims + 1]`.

        The gradient is with respect to log lambda and, last, to the log of the attention factor; at
        a point by layer and head first to all lambdas `[L, Hk, dims]`, then to all factors, flat.
        `windows` is int64 `[S, N]`; windows go through the model one at a time.
        """
        with differentiating(self.model), kernel_attention(self.model):
            measured = self.ranks.share(
                [functools.partial(self._window, point, start_tokens, w) for w in windows]
            )
        # In the order of the windows, so that the bits are those of one process.
        size = np.size(point.log_lambdas) + np.size(point.attention_factor)
        total, gradient = 0.0, np.zeros(size)
        for nll, by_parameter in measured:
            total += nll
            gradient += by_parameter
        count = scored_tokens(windows, self.last_tokens) * len(windows)
        return total / count, gradient / count

    def _window(
        self, point: Point, start_tokens: int, window: torch.Tensor
    ) -> tuple[float, np.ndarray]:
        """Return the sum of the NLL over a window's scored tokens, and its gradient."""
        inv_freq = self.base_inv_freq * torch.from_numpy(np.exp(-point.log_lambdas))
        factor = torch.tensor(point.attention_factor, dtype=torch.float64)
        inv_freq.requires_grad_()
        factor.requires_grad_()
        settings = inv_freq, factor
        if inv_freq.dim() > 1:  # by layer and head: one row of the batch
            settings = inv_freq[:, None], factor[:, None]
        nll = self._backward(window[None], settings[0], start_tokens, settings[1]).item()
        # By log lambda, of which the frequencies are exponentials, and by the log of the factor.
        by_log = ((-inv_freq * inv_freq.grad).flatten(), (factor * factor.grad).flatten())
        return nll, torch.cat(by_log).detach().numpy()

    def _backward(
        self, window: torch.Tensor, inv_freq: torch.Tensor, start_tokens: int, factor: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of the NLL of a window `[1, N]`, after its backward pass.

        The sum, not the mean: in float16 the gradients of a mean would underflow.
        """
        with (
            rows_with_factors(self.model, inv_freq, start_tokens, factor),
            checkpointing_layers(self.model, self.plan.checkpointed_layers),
        ):
            return self._score.backward(window, scored_tokens(window, self.last_tokens))


def expect_finite(
    nll: float, gradient: np.ndarray, length: int, step: int, what: str = "the gradient"
) -> None:
    """Raise `NotFiniteError` where a step over windows of `length` tokens cannot go on."""
    if not (math.isfinite(nll) and np.isfinite(gradient).all()):
        raise NotFiniteError(
            f"model: its mean NLL at {length} tokens, or {what}, is not finite in step {step} "
            f"(NLL {nll})"
        )


@contextlib.contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode with frozen weights and gradients on; restore its flags after."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), running_eagerly(model):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def checkpointing_layers(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Checkpoint the decoder's layers inside a `with` block.

    transformers' own switch works in training mode alone, in which dropout is on.
    """
    layers = list(decoder(model).layers) if active else []
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
