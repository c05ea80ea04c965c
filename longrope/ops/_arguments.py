"""Checks of arguments that several ops and their references share, and errors in one sentence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def describe(value: object) -> str:
    """Return `float32 [2, 64]` for a tensor, its repr for anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)


def expect(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise ValueError `name: expected ..., got ...` unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}")


def argument_names(op: str) -> list[str]:
    """Return the names of the arguments of `longrope::op`, in the order of its schema."""
    return [a.name for a in getattr(torch.ops.longrope, op).default._schema.arguments]


def check_tensors(**tensors: Tensor) -> None:
    """Check that all are dense tensors on the device of the first."""
    device = None
    for name, tensor in tensors.items():
        expect(isinstance(tensor, Tensor), name, "a tensor", type(tensor))
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {tensor.layout}")
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def is_int64(value: object) -> bool:
    """Return whether this is an int that fits 64 bits, or a symbol for one."""
    if isinstance(value, torch.SymInt):
        return True
    return isinstance(value, int) and -(2**63) <= value < 2**63


def check_frequencies(
    inv_freq: Tensor,
    start_tokens: int | Tensor,
    base_inv_freq: Tensor | None,
    attention_factor: float | Tensor,
    batch: int | None = None,
    tiers: int | None = None,
    heads: tuple[int, ...] | None = None,
) -> None:
    """Check what turns: dtypes, shapes among each other and, where given, the batch size.

    With `tiers`, each of the tiers has frequencies, start tokens and an attention factor. With
    `heads`, those of q and of k, frequencies and factors may come by groups of them.
    """
    rows = "B" if batch is None else str(batch)
    sizes = [] if tiers is None else [tiers]

    def fits(t: Tensor, *shape: int) -> bool:
        by_row = t.dim() == len(shape) + 1 and batch in (None, t.shape[0])
        return (t.dim() == len(shape) or by_row) and tuple(t.shape)[int(by_row) :] == shape

    grouped = (
        heads is not None and isinstance(inv_freq, Tensor) and inv_freq.dim() == len(sizes) + 3
    )
    groups = inv_freq.shape[1] if grouped else 0

    def fits_by_group(t: Tensor, *shape: int) -> bool:
        if not grouped or t.dim() != len(shape) + 2:
            return fits(t, *shape)
        rows_fit = batch is None or t.shape[0] in (1, batch)
        return rows_fit and t.shape[1] == groups and tuple(t.shape)[2:] == shape

    def listed(*shape: int | str) -> str:
        return ", ".join([f"{size}" for size in shape])  # str(size) breaks torch.compile's graph

    def text(*shape: int | str) -> str:
        return f"[{listed(*shape)}] or [{listed(rows, *shape)}]"

    def by_group(*shape: int | str) -> str:
        if not grouped:
            return ""
        return f" or [{listed(f'{rows} or 1', groups, *shape)}]"

    starts = "an int or int64 " + (text(*sizes) if sizes else f"[{rows}]")

    def is_float64(t: object) -> bool:
        return isinstance(t, Tensor) and t.dtype == torch.float64 and t.dim() > 0

    expect(
        is_float64(inv_freq) and inv_freq.shape[-1] > 0
        and fits_by_group(inv_freq, *sizes, inv_freq.shape[-1]),
        "inv_freq", f"float64 {text(*sizes, 'R/2')}{by_group(*sizes, 'R/2')}", inv_freq,
    )  # fmt: skip
    if grouped:
        expect(
            groups > 0 and not any(count % groups for count in heads), "inv_freq",
            f"groups into which {' and '.join(map(str, heads))} heads part evenly", inv_freq,
        )  # fmt: skip
    pairs = inv_freq.shape[-1]
    if isinstance(start_tokens, Tensor):
        expect(
            start_tokens.dtype == torch.int64 and start_tokens.dim() > 0
            and fits(start_tokens, *sizes),
            "start_tokens", starts, start_tokens,
        )  # fmt: skip
    else:
        expect(is_int64(start_tokens), "start_tokens", starts, start_tokens)
        expect(start_tokens >= 0, "start_tokens", "0 or more", start_tokens)
    if base_inv_freq is not None:
        expect(
            is_float64(base_inv_freq) and fits(base_inv_freq, pairs),
            "base_inv_freq", f"float64 {text(pairs)}", base_inv_freq,
        )  # fmt: skip
    elif isinstance(start_tokens, Tensor) or start_tokens > 0:
        raise ValueError("base_inv_freq: required with start_tokens")
    if isinstance(attention_factor, Tensor):
        expect(
            attention_factor.is_floating_point()
            and (attention_factor.dim() == 0 or fits_by_group(attention_factor, *sizes)),
            "attention_factor",
            "a number, or a float tensor " + ("[], " if sizes else "") + text(*sizes)
            + by_group(*sizes),
            attention_factor,
        )  # fmt: skip
    else:
        finite = isinstance(attention_factor, (int, float)) and math.isfinite(attention_factor)
        expect(finite, "attention_factor", "a finite number", attention_factor)


def check_positions(
    name: str, positions: Tensor, batch: int | None = None, tokens: int | None = None
) -> None:
    """Check that positions are int64 `[N]` or `[B, N]`."""
    expect(
        isinstance(positions, Tensor) and positions.dtype == torch.int64
        and positions.dim() in (1, 2)
        and (tokens is None or positions.shape[-1] == tokens)
        and (batch is None or positions.dim() == 1 or positions.shape[0] == batch),
        name,
        f"int64 [{'N' if tokens is None else tokens}] or "
        f"[{'B' if batch is None else batch}, {'N' if tokens is None else tokens}]",
        positions,
    )  # fmt: skip


def factor_sets(from_factors: Any, to_factors: Any, device: torch.device) -> tuple:
    """Return what turns one set of rescale factors into another, as the ops take it.

    `(inv_freq, base_inv_freq, start_tokens)` of each set, and the ratio of the attention factors: a
    number, and where it differs between heads a tensor `[1, G]`, else None. The base frequencies
    are `theta^(-2i/R)`.
    """
    for name, factors in (("from_factors", from_factors), ("to_factors", to_factors)):
        expect(hasattr(factors, "rotary_dim"), name, "longrope.RescaleFactors", factors)
        if factors.lambdas.ndim > 1 and len(factors.lambdas) > 1:
            raise ValueError(
                f"{name}: expected the factors of one layer (RescaleFactors.layer), got those of "
                f"{len(factors.lambdas)}"
            )
    expect(
        from_factors.rotary_dim == to_factors.rotary_dim,
        "to_factors", f"rotary_dim {from_factors.rotary_dim} as in from_factors",
        to_factors.rotary_dim,
    )  # fmt: skip
    sets: list = []
    for factors in (from_factors, to_factors):
        inv_freq = torch.as_tensor(factors.inv_freq(), dtype=torch.float64, device=device)
        base = None
        if factors.start_tokens > 0:
            exponent = torch.arange(0, factors.rotary_dim, 2, dtype=torch.float64, device=device)
            base = float(factors.rope_theta) ** (-exponent / factors.rotary_dim)
        sets += [inv_freq, base, factors.start_tokens]
    ratio = to_factors.attention_factor / from_factors.attention_factor
    if isinstance(ratio, float):
        return *sets, ratio, None
    return *sets, 1.0, torch.as_tensor(ratio, dtype=torch.float64, device=device)


def as_autocast(t: Tensor) -> Tensor:
    """Return a factor of a product in the dtype that torch takes it in under autocast."""
    device = t.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return t
    wide = t.dtype == torch.float64 or not t.is_floating_point()  # autocast leaves those alone
    return t if wide else t.to(torch.get_autocast_dtype(device))
