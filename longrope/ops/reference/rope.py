"""The specification of rope, rope_ and rerotate: exact phases, float64, autograd."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longrope.ops._arguments import check_frequencies, check_positions, expect, factor_sets

__all__ = ["phase_turns", "rerotate", "rerotate_rows_", "rope", "rope_", "turns_per_token"]

_FRACTION_BITS = (
    1280  # of 1 / (2 pi): a double has up to 1024 bits before its point, 64 stay behind
)


def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    start_tokens: int | Tensor = 0,
    base_inv_freq: Tensor | None = None,
    attention_factor: float | Tensor = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `longrope.ops.rope`. Computed in float64 and rounded once, gradients by autograd."""
    batch, heads, tokens, head_dim = q.shape
    check_frequencies(
        inv_freq, start_tokens, base_inv_freq, attention_factor, batch, heads=(heads, k.shape[1])
    )
    check_positions("positions", positions, batch, tokens)
    expect(
        2 * inv_freq.shape[-1] <= head_dim, "inv_freq", f"at most {head_dim // 2} frequencies",
        inv_freq,
    )  # fmt: skip
    angle = _angle(positions, inv_freq, start_tokens, base_inv_freq)
    factor = torch.as_tensor(attention_factor, dtype=torch.float64, device=q.device)
    factor = factor.reshape(-1, factor.shape[1] if factor.dim() > 1 else 1, 1, 1)
    return _turn(q, angle, factor, interleaved), _turn(k, angle, factor, interleaved)


def rope_(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    start_tokens: int | Tensor = 0,
    base_inv_freq: Tensor | None = None,
    attention_factor: float | Tensor = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `longrope.ops.rope_`."""
    with torch.no_grad():
        q_turned, k_turned = rope(
            q, k, positions, inv_freq, start_tokens, base_inv_freq, attention_factor, interleaved
        )
        return q.copy_(q_turned), k.copy_(k_turned)


def rerotate(
    k: Tensor,
    positions: Tensor,
    from_factors: Any,
    to_factors: Any,
    interleaved: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """See `longrope.ops.rerotate`."""
    check_positions("positions", positions, k.shape[0], k.shape[2])
    sets = factor_sets(from_factors, to_factors, k.device)
    undo, undo_base, undo_start, turn, turn_base, turn_start, ratio, by_group = sets
    angle = _angle(positions, turn, turn_start, turn_base, undo, undo_start, undo_base)
    factor = torch.as_tensor(ratio if by_group is None else by_group, device=k.device)
    turned = _turn(k, angle, factor.double().reshape(1, -1, 1, 1), interleaved)
    return turned if out is None else out.copy_(turned)


def rerotate_rows_(
    k: Tensor,
    positions: Tensor,
    from_tier: Tensor,
    to_tier: Tensor,
    inv_freq: Tensor,
    start_tokens: int | Tensor = 0,
    base_inv_freq: Tensor | None = None,
    attention_factor: float | Tensor = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """See `longrope.ops.rerotate_rows_`."""
    batch, heads, tokens, _ = k.shape
    tiers = inv_freq.shape[-2]
    check_positions("positions", positions, batch, tokens)
    check_frequencies(
        inv_freq, start_tokens, base_inv_freq, attention_factor, batch, tiers, (heads,)
    )
    factors = torch.as_tensor(attention_factor, dtype=torch.float64, device=k.device)
    starts = torch.as_tensor(start_tokens, device=k.device).expand(batch, tiers)
    groups = inv_freq.shape[1] if inv_freq.dim() == 4 else 1
    if factors.dim() < 3:
        factors = factors.expand(batch, tiers)[:, None]
    if inv_freq.dim() < 4:
        inv_freq = inv_freq.expand(batch, tiers, inv_freq.shape[-1])[:, None]
    factors = factors.expand(batch, groups, tiers)
    inv_freq = inv_freq.expand(batch, groups, tiers, inv_freq.shape[-1])
    still = torch.zeros_like(inv_freq[:1, :, 0])  # what is not rotated turns by nothing
    for name, tier in (("from_tier", from_tier), ("to_tier", to_tier)):
        expect(tier.dtype == torch.int64 and tier.shape == (batch,), name, f"int64 [{batch}]", tier)

    def tier_of(row: int, tier: int) -> tuple:
        expect(-1 <= tier < tiers, "tier", f"-1 (not rotated) to {tiers - 1}", tier)
        if tier == -1:
            return still, 0, still, torch.ones_like(factors[0, :, 0])
        base = None if base_inv_freq is None else base_inv_freq.expand(batch, -1)[row]
        return inv_freq[row, None, :, tier], starts[row, tier], base, factors[row, :, tier]

    positions = positions.expand(batch, tokens)
    for row, (one, other) in enumerate(zip(from_tier.tolist(), to_tier.tolist(), strict=True)):
        if one == other:
            continue
        undo, turn = tier_of(row, one), tier_of(row, other)
        angle = _angle(positions[row : row + 1], *turn[:3], *undo[:3])
        factor = (turn[3] / undo[3]).reshape(1, -1, 1, 1)
        k[row] = _turn(k[row : row + 1], angle, factor, interleaved)[0]
    return k


@lru_cache(maxsize=1)
def _inverse_two_pi() -> int:
    """Return 2^_FRACTION_BITS / (2 pi), by Machin's formula for pi in integers."""
    one = 1 << (2 * _FRACTION_BITS)

    def arctan_of_inverse(x: int) -> int:
        term, total, n = one // x, 0, 0
        while term:
            total += (-1) ** n * (term // (2 * n + 1))
            term //= x * x
            n += 1
        return total

    pi = 16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)
    return (one << _FRACTION_BITS) // (2 * pi)


@lru_cache(maxsize=65536)
def turns_per_token(inv_freq: float) -> int:
    """Return `round(inv_freq / (2 pi) * 2^64)` modulo one turn, as a signed 64-bit integer."""
    numerator, denominator = inv_freq.as_integer_ratio()  # exact; the denominator is a power of 2
    scaled = (numerator * _inverse_two_pi() << 64) // denominator
    turns = (scaled + (1 << (_FRACTION_BITS - 1))) >> _FRACTION_BITS  # to nearest
    return (turns + 2**63) % 2**64 - 2**63


def phase_turns(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Return `positions[..., None] * inv_freq` in turns times 2^64, int64 modulo one turn.

    Frequencies `[..., R/2]` with leading dimensions belong to those of the positions.
    """
    frequencies = [turns_per_token(f) for f in inv_freq.detach().flatten().tolist()]
    fixed = torch.tensor(frequencies, dtype=torch.int64, device=inv_freq.device)
    fixed = fixed.reshape(inv_freq.shape)
    if fixed.dim() > 1:
        fixed = fixed[..., None, :]
    return positions[..., None] * fixed  # wraps modulo 2^64, which is one turn


def _choose(positions: Tensor, start_tokens: int | Tensor, base: Any, rescaled: Any) -> Any:
    """Take `base` below the start tokens, `rescaled` elsewhere: `[B or 1, G or 1, N, pairs]`."""
    start = torch.as_tensor(start_tokens, device=positions.device).reshape(-1, 1, 1)
    below = (positions < start) & (start > 0)
    return torch.where(below[..., None], base, rescaled)


def _angle(
    positions: Tensor,
    inv_freq: Tensor,
    start_tokens: int | Tensor,
    base_inv_freq: Tensor | None,
    undo: Tensor | None = None,
    undo_start: int | Tensor = 0,
    undo_base: Tensor | None = None,
) -> Tensor:
    """Return the angles, float64 radians `[B or 1, G or 1, N, pairs]`: exact, differentiable."""

    def by_group(t: Tensor) -> Tensor:
        return t if t.dim() > 2 else torch.atleast_2d(t).unsqueeze(1)

    positions = by_group(positions)
    inv_freq = by_group(inv_freq)
    base = inv_freq if base_inv_freq is None else by_group(base_inv_freq)
    turns = _choose(
        positions, start_tokens, phase_turns(positions, base), phase_turns(positions, inv_freq)
    )
    if undo is not None:
        undo = by_group(undo)
        base_undo = undo if undo_base is None else by_group(undo_base)
        turns = turns - _choose(
            positions, undo_start, phase_turns(positions, base_undo), phase_turns(positions, undo)
        )
    exact = turns.to(torch.float64) * (2 * torch.pi / 2**64)
    # The value is the exact phase; the derivative is that of position * inv_freq.
    linear = positions[..., None] * _choose(
        positions, start_tokens, base[..., None, :], inv_freq[..., None, :]
    )
    return exact + (linear - linear.detach())


def _turn(x: Tensor, angle: Tensor, factor: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of `x` `[B, H, N, D]` by `angle` `[B or 1, G or 1, N, pairs]`, times `factor`.

    `factor` is `[B or 1, G or 1, 1, 1]`. The heads part evenly into the groups.
    """
    rotary_dim = 2 * angle.shape[-1]
    cos, sin = angle.cos() * factor, angle.sin() * factor
    if cos.shape[1] > 1:
        each = x.shape[1] // cos.shape[1]
        cos, sin = cos.repeat_interleave(each, 1), sin.repeat_interleave(each, 1)
    wide = x.to(torch.float64)
    turned, rest = wide[..., :rotary_dim], wide[..., rotary_dim:]
    if interleaved:
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)
    else:
        x1, x2 = turned.chunk(2, -1)
        turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
    return torch.cat((turned, rest), -1).to(x.dtype)
