"""Attention by torch alone, where our kernels are not built or cannot do the job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

#: What torch's flash kernels take; they alone read keys that heads share as they are, forward and
#: backward on every GPU up to this head_dim. For others torch has a kernel too, memory-efficient,
#: but only for a key of each head: asked to share, it makes the matrix of all scores.
HALVES = (torch.bfloat16, torch.float16)
GROUPED_HEAD_DIM = 192


@dataclass(frozen=True)
class Options:
    """What attention is asked for beside queries, keys and values."""

    scale: float | None
    window: int | None
    softcap: float | None


def attend_by_torch(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, options: Options
) -> Tensor:
    """Attend by `scaled_dot_product_attention`: where our kernels are not built, or keys are amiss.

    `mask` is bool `[B, M]`, which keys exist.
    """
    if options.softcap is not None:
        raise ValueError(
            "softcap: expected none where attention_mask has holes or longrope's kernels are not "
            f"built for {query.device.type}, got {options.softcap}"
        )
    if options.window is None and mask is None:
        return attend_unmasked(query, keys, values, True, options.scale)
    count, total = query.shape[2], keys.shape[2]
    key = torch.arange(total, device=query.device)
    position = torch.arange(total - count, total, device=query.device)[:, None]
    seen = key <= position
    if options.window is not None:
        seen &= key > position - options.window
    if mask is not None:
        seen = seen & mask[:, None, None]
        seen = seen | ~seen.any(-1, keepdim=True)  # a query that is padding: anything finite
    return nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=seen, scale=options.scale, enable_gqa=True
    )


def attend_unmasked(
    query: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float | None
) -> Tensor:
    """Attend by `scaled_dot_product_attention`, the queries being the last of the positions.

    Without a mask of its own, which would shut out torch's fast kernels.
    """
    count, total = query.shape[2], keys.shape[2]
    options: dict[str, Any] = {"scale": scale}
    if causal and count == total:
        options["is_causal"] = True
    elif causal and count > 1:  # one query sees every key
        options["attn_mask"] = _lower_right(count, total, query.device)
    group = query.shape[1] // keys.shape[1]
    if group > 1 and query.dtype in HALVES and query.shape[3] <= GROUPED_HEAD_DIM:
        options["enable_gqa"] = True
    elif group > 1:
        keys, values = (
            t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (keys, values)
        )
    return nn.functional.scaled_dot_product_attention(query, keys, values, **options)


def _lower_right(count: int, total: int, device: torch.device) -> Tensor:
    """Return the mask of the last `count` of `total` positions, in memory only where compiled.

    torch.compile cannot trace the making of a `CausalBias`.
    """
    if torch.compiler.is_compiling():
        ones = torch.ones(count, total, dtype=torch.bool, device=device)
        return ones.tril(total - count)
    return causal_lower_right(count, total)
