"""Attention by torch alone, where our kernels are not built or cannot do the job."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
    count, total = query.shape[2], keys.shape[2]
    if count == 1 and options.window is None and mask is None:  # sees every key
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, scale=options.scale, enable_gqa=True
        )
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
