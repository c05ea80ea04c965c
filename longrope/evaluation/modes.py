"""What a model must be while it is measured: in eval mode, without gradients, with a vocabulary."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn

from longrope.patching.wrappers import (
    is_offloaded,
    is_sharded,
    language_model,
    running_eagerly,
)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without gradients; restore every module's own flag after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Weights that are put back after a pass must not be inference tensors.
        moving = is_offloaded(model) or is_sharded(model)
        without_gradients = torch.no_grad() if moving else torch.inference_mode()
        with without_gradients, running_eagerly(model):
            yield
    finally:
        for module in training:
            module.training = True


def vocabulary(model: nn.Module) -> int | None:
    """Return the number of rows of the model's token embedding, None where it has none.

    Raises `ValueError` where this is no model that predicts the next token.
    """
    inner = language_model(model)
    if not isinstance(inner, nn.Module) or _has_no_head(inner):
        without = " without a head that predicts tokens" * isinstance(inner, nn.Module)
        raise ValueError(
            "model: expected a Hugging Face causal language model, "
            f"got {type(inner).__name__}{without}"
        )
    taken = inspect.signature(inner.forward).parameters.values()
    if not any(p.name == "input_ids" or p.kind is p.VAR_KEYWORD for p in taken):
        hint = "; its .llama is one" * hasattr(inner, "llama")
        raise ValueError(
            "model: expected a Hugging Face causal language model, "
            f"got {type(inner).__name__}, which takes no input_ids{hint}"
        )
    embedding = getattr(inner, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    return None if weight is None else weight.shape[0]


def _has_no_head(model: nn.Module) -> bool:
    """Say whether this is a decoder alone, a classifier or the like of transformers."""
    return (
        hasattr(getattr(model, "config", None), "model_type")
        and not getattr(model, "can_generate", lambda: True)()
        and getattr(model, "get_output_embeddings", lambda: None)() is None
    )
