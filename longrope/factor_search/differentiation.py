"""The gradient of a model's loss with respect to rescale factors; its weights stay frozen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longrope.evaluation import evaluating
from longrope.factor_search.gradient import Point
from longrope.factor_search.objective import scored_tokens
from longrope.factor_search.ranks import Ranks
from longrope.layout import free_memory
from longrope.patching import rows as rows_with_factors
from longrope.patching.attention import kernel_attention
from longrope.patching.models import decoder
from longrope.scoring import NextTokenNLL

#: Bytes kept for the backward pass, per layer and token, over the bytes of the residual stream:
#: the residual, norms, queries, keys and values before and after the rotation, the attention's
#: output, some of them in float32. Measured with the packaged model: 5 in float32, 7 in bfloat16.
_KEPT_OVER_HIDDEN = 8
#: The same over the bytes of the inner activation: gate, its activation, up and their product.
_KEPT_OVER_INNER = 4


class LossGradient:
    """The mean NLL of windows at a point, and its gradient; the model is left as it was.

    Only the rotary frequencies and the attention factor carry gradients: the weights may be of any
    dtype, and nothing of their size is kept. The frequencies are float64.

    Parameters
    ----------
    model
        A causal language model that `longrope.apply` supports.
    base_inv_freq
        The original frequencies, float64 `[dims]`.
    activation_checkpointing
        Keep only the input of each layer for the backward pass and compute the rest again there:
        a third more work for a fraction of the memory.
    last_tokens
        Only the last tokens of each window are scored; None: all but the first.
    ranks
        Who share the windows of a call: window `w` is measured by rank `w % ranks.size`.
    """

    def __init__(
        self,
        model: nn.Module,
        base_inv_freq: np.ndarray,
        activation_checkpointing: bool = False,
        last_tokens: int | None = None,
        ranks: Ranks | None = None,
    ):
        self.model = model
        self.last_tokens = last_tokens
        self.base_inv_freq = torch.from_numpy(base_inv_freq)
        self.activation_checkpointing = activation_checkpointing
        self.ranks = ranks or Ranks()
        with evaluating(model):
            self._score = NextTokenNLL(model)

    def __call__(
        self, point: Point, start_tokens: int, windows: torch.Tensor
    ) -> tuple[float, np.ndarray]:
        """Return the mean NLL in nats and its gradient, float64 `[dims + 1]`.

        The gradient is with respect to log lambda and, last, to the log of the attention factor.
        `windows` is int64 `[S, N]`; windows go through the model one at a time.
        """
        with differentiating(self.model), kernel_attention(self.model):
            measured = self.ranks.share(
                [functools.partial(self._window, point, start_tokens, w) for w in windows]
            )
        # In the order of the windows, so that the bits are those of one process.
        total, gradient = 0.0, np.zeros(len(point.log_lambdas) + 1)
        for nll, by_parameter in measured:
            total += nll
            gradient += by_parameter
        count = scored_tokens(windows, self.last_tokens) * len(windows)
        return total / count, gradient / count

    def _window(
        self, point: Point, start_tokens: int, window: torch.Tensor
    ) -> tuple[float, np.ndarray]:
        """Return the sum of the NLL over a window's scored tokens, and its gradient."""
        log_lambdas = torch.tensor(point.log_lambdas, requires_grad=True)
        log_factor = torch.tensor(
            np.log(point.attention_factor), dtype=torch.float64, requires_grad=True
        )
        with (
            rows_with_factors(
                self.model,
                self.base_inv_freq * (-log_lambdas).exp(),
                start_tokens,
                log_factor.exp(),
            ),
            checkpointing_layers(self.model, self.activation_checkpointing),
        ):
            # The sum, not the mean: in float16 the gradients of a mean would underflow.
            scored = scored_tokens(window[None], self.last_tokens)
            nll = self._score(window[None], scored).double().sum()
            nll.backward()
        return nll.item(), torch.cat([log_lambdas.grad, log_factor.grad[None]]).numpy()


@contextlib.contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode with frozen weights and gradients on; restore its flags after."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
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


def needs_checkpointing(model: nn.Module, length: int) -> bool:
    """Say whether the activations of one window would take more than half of the free memory."""
    parameter = next(model.parameters())
    config = decoder(model).config
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    layers = config.num_hidden_layers
    kept = layers * length * (_KEPT_OVER_HIDDEN * hidden + _KEPT_OVER_INNER * inner)
    free = free_memory(parameter.device)
    return free is not None and kept * parameter.element_size() > free / 2
