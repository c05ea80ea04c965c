"""Greedy generation for measurements: each prompt goes through the model once, in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from longrope.evaluation.nll import NextTokenNLL
from longrope.patching.families import decoder
from longrope.patching.window_cache import window_cache


def stop_tokens(model: nn.Module) -> frozenset[int]:
    """Return the tokens that end an answer, by the model's generation config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if named is None:
        return frozenset()
    return frozenset([named] if isinstance(named, int) else named)


def check_generates(model: Any) -> None:
    """Refuse a model that cannot write."""
    if not callable(getattr(model, "generate", None)):
        raise ValueError(
            "model: expected a causal language model with generate, got "
            f"{type(model).__name__} without it"
        )


def greedy(score: NextTokenNLL, ids: torch.Tensor, new_tokens: int) -> list[list[int]]:
    """Return the likeliest continuation of each prompt, up to a token that ends it.

    The prompt is read in chunks of `score.chunk` tokens, the new tokens one by one, all through
    one cache with room for them. A model of no family of `longrope.patching` goes through its own
    `generate`. Tiers by row are those of the whole length, new tokens included.

    Parameters
    ----------
    score
        Of the model, within `evaluating`.
    ids
        The prompts, int64 `[B, N]`, without padding.
    new_tokens
        The most tokens to write, at least 1.

    Returns
    -------
    list of lists
        The new ids of each row, without the token that ended it.
    """
    ids, stop = ids.to(score.device), stop_tokens(score.model)
    length = ids.shape[1]
    try:
        decoder(score.model)
    except (AttributeError, TypeError, ValueError):
        written = score.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            num_beams=1, pad_token_id=min(stop, default=0),
        )[:, length:].T  # fmt: skip
    else:
        written = _written(score, ids, new_tokens, stop)
    rows = torch.stack(list(written), dim=1).tolist()
    return [_until(row, stop) for row in rows]


def _written(
    score: NextTokenNLL, ids: torch.Tensor, new_tokens: int, stop: frozenset[int]
) -> list[torch.Tensor]:
    """Return the new tokens, each `[B]`."""
    length = ids.shape[1]
    chunk = score.chunk or length
    cache = window_cache(score.model, length + new_tokens - 1)
    written: list[torch.Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool, device=score.device)
    ends = torch.tensor(sorted(stop), dtype=ids.dtype, device=score.device)
    with score.planned(length + new_tokens):
        for start in range(0, length, chunk):
            output = score.append(ids[:, start : start + chunk], start, cache)
        while True:
            token = score.logits(output[:, -1:])[:, 0].argmax(-1)
            written.append(token)
            done |= torch.isin(token, ends)
            if len(written) == new_tokens or (stop and bool(done.all())):
                return written
            output = score.append(token[:, None], length + len(written) - 1, cache)


def _until(row: list[int], stop: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stop), len(row))
    return row[:end]
