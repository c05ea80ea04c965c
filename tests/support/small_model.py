"""A small `LongRoPEModel` with random weights."""

from __future__ import annotations

import torch

import longrope

WIDTH, BASE = 64, 32


def build(scale=8.0, target=None, **changes):
    """Return a small model whose weights are large enough that positions matter."""
    sizes = {"d_model": WIDTH, "n_heads": 4, "num_layers": 2, "base_length": BASE}
    model = longrope.LongRoPEModel(**(sizes | {"n_kv_heads": 2, "vocab_size": 64} | changes))
    with torch.no_grad():
        for weight in model.llama.model.layers.parameters():
            if weight.dim() == 2:
                weight *= scale
    return model if target is None else model.extend_context(None, target, method="yarn")


def ids(batch=2, length=4 * BASE):
    return torch.randint(0, 64, (batch, length))
