"""Tiers by position as the rule says it, in plain PyTorch: what every path is compared with."""

from __future__ import annotations

import copy
import math

import torch
from transformers.models.llama.modeling_llama import rotate_half


def reference(model, ids, tiers):
    """Compute logits by the rule, in float64: each query under its tier, with all keys under it."""
    return logits_by_the_rule(copy.deepcopy(model).double(), ids, tiers).detach()


def logits_by_the_rule(model, ids, tiers):
    """The same of a Llama as it is, with gradients; factors may differ by layer and head."""
    base, config = model.model, model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    position = torch.arange(ids.shape[1])
    limits = torch.tensor(tiers.limits)
    tier = torch.searchsorted(limits, position, right=True).clamp(max=len(tiers) - 1)
    own = [set_.spread(len(base.layers), groups) for set_ in tiers]

    def turned(x, set_, layer):  # [B, heads, N, D]
        def of_heads(by_group):
            each = torch.tensor(by_group[layer]).repeat_interleave(x.shape[1] // groups, 0)
            return each.reshape(x.shape[1], 1, -1)

        early = position[:, None] < set_.start_tokens
        base_inv_freq = torch.from_numpy(set_.base_inv_freq())
        angle = position[:, None] * torch.where(early, base_inv_freq, of_heads(set_.inv_freq()))
        cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
        return (x * cos + rotate_half(x) * sin) * of_heads(set_.attention_factor)

    hidden = base.embed_tokens(ids)
    seen = position[None] <= position[:, None]
    for number, layer in enumerate(base.layers):
        x, block = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (
            proj(x).unflatten(-1, (count, -1)).transpose(1, 2)
            for proj, count in (
                (block.q_proj, heads), (block.k_proj, groups), (block.v_proj, groups),
            )
        )  # fmt: skip
        out = torch.zeros_like(q)
        each = heads // groups
        for t, set_ in enumerate(own):
            keys = turned(k, set_, number).repeat_interleave(each, 1)
            scores = turned(q, set_, number) @ keys.mT / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            out = torch.where((tier == t)[:, None], weights @ v.repeat_interleave(each, 1), out)
        hidden = hidden + block.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(base.norm(hidden))
