"""What a model must be while it is measured: in eval mode, without gradients, with a vocabulary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without gradients; restore every module's own flag after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def vocabulary(model: nn.Module) -> int | None:
    """Return the number of rows of the model's token embedding, None where it has none.

    Raises `ValueError` where this is no module at all.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: expected a Hugging Face causal language model, got {type(model).__name__}"
        )
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    return None if weight is None else weight.shape[0]
