"""What benchmarks of the search share: populations, and Hugging Face's own way to measure them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch

from longrope.factor_search.options import SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factor_search.space import Candidate
from longrope.patching import rope_settings


@contextlib.contextmanager
def plain_factors(model, factors):
    """Put factors into the model's own rotary module: float32 angles, cos and sin in its dtype."""
    rotary = model.base_model.rotary_emb
    device = next(model.parameters()).device
    base, rescaled = (
        torch.tensor(values, dtype=torch.float32, device=device)
        for values in (factors.base_inv_freq(), factors.inv_freq())
    )

    def forward(x, position_ids):
        positions = position_ids[..., None]
        early = positions < factors.start_tokens
        angles = positions.float() * torch.where(early, base, rescaled)
        angles = torch.cat([angles, angles], dim=-1)
        return tuple(
            (f(angles) * factors.attention_factor).to(x.dtype) for f in (torch.cos, torch.sin)
        )

    rotary.forward = forward
    try:
        yield
    finally:
        del rotary.forward


def losses_of_hugging_face(model, factors: Sequence, windows: torch.Tensor) -> list[float]:
    """Return the mean NLL over windows, by one forward and loss of the model for each factors.

    As a published search does it: the model's own attention and its own rotary module.
    """
    losses = []
    for one in factors:
        with torch.inference_mode(), plain_factors(model, one):
            losses.append(model(input_ids=windows, labels=windows, use_cache=False).loss.item())
    return losses


def population(model, target_length: int, size: int) -> tuple[Problem, list[Candidate]]:
    """Return a search's problem, and PI, NTK, YaRN and mutations of them as Algorithm 1 begins."""
    options = SearchOptions(target_length=target_length, attention_factor="yarn")
    problem = Problem.of(rope_settings(model), options)
    random = np.random.default_rng(0)
    seeds = list(problem.seeds().values())
    mutated = [problem.space.mutate(seeds[i % len(seeds)], 0.3, random) for i in range(size)]
    return problem, [*seeds, *mutated][:size]
