"""The rotary module that takes the place of a model's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from longrope.factors import RescaleFactors
from longrope.patching.keeping import KeepsNumbers
from longrope.patching.rotation import (
    DEVICES_WITH_KERNELS,
    KernelRotation,
    TableRotation,
    accept_rotations,
    tabulate,
)


def bits(values: np.ndarray) -> Tensor:
    """Return float64 numbers as the int64 of their bits.

    A buffer of integers keeps them: `model.to(bfloat16)` and `half()` leave it alone.
    """
    return torch.from_numpy(values.astype(np.float64).view(np.int64))


def stacked(tiers: Sequence[RescaleFactors]) -> tuple[np.ndarray, np.ndarray]:
    """Return the frequencies and the attention factors of tiers.

    `[T, R/2]` and `[T]`; where some of them differ between layers or heads `[T, L, G, R/2]` and
    `[T, L, G]`.
    """
    if heads := [tier.heads for tier in tiers if tier.per_head]:
        layers_and_heads = [max(counts) for counts in zip(*heads, strict=True)]
        tiers = [tier.spread(*layers_and_heads) for tier in tiers]
    return (
        np.stack([tier.inv_freq() for tier in tiers]),
        np.stack([tier.attention_factor for tier in tiers]),
    )


class RescaledRotaryEmbedding(KeepsNumbers):
    """A model's rotary embedding with rescaled frequencies, chosen for each row of the batch.

    Parameters
    ----------
    original
        The rotary module that this one replaces; kept for `longrope.remove`.
    tiers
        One or more factor sets by growing `target_length`. A row takes the first whose target it
        does not exceed, and the last beyond that.
    """

    def __init__(self, original: nn.Module, tiers: Sequence[RescaleFactors]):
        super().__init__()
        self.original = original
        self.tiers = tuple(tiers)
        self.put_numbers()
        self.rows: tuple[Tensor, Tensor, Tensor] | None = None
        #: The tier of each row of the batch, `[B]` or `[1]`, where a hook has found it out.
        self.tier: Tensor | None = None
        #: The lengths that rows will have, `[B]` or `[1]`, where somebody has said so.
        self.planned_lengths: Tensor | None = None
        #: What the hooks of `longrope.patching.tiers` need between the start and end of a pass.
        self.cached_keys = None
        self.hooks = ()

    def __setstate__(self, state: dict) -> None:
        """Become a copy, maybe in a process that has applied nothing."""
        super().__setstate__(state)
        accept_rotations(self.original)

    def numbers(self) -> dict[str, Tensor]:
        """Return the buffers by name, on the CPU."""
        tiers = self.tiers
        inv_freq, factors = stacked(tiers)
        return {
            "inv_freq_bits": bits(inv_freq),
            "base_bits": bits(tiers[0].base_inv_freq()),
            "factor_bits": bits(factors),
            "start_tokens": torch.from_numpy(np.array([f.start_tokens for f in tiers])),
            "limits": torch.from_numpy(np.array([f.target_length for f in tiers])),
        }

    def extra_repr(self) -> str:
        """Name the lengths, for `print(model)`."""
        return "tiers up to " + ", ".join(str(f.target_length) for f in self.tiers) + " tokens"

    def set_rows(
        self,
        inv_freq: Tensor,
        start_tokens: Tensor | int = 0,
        attention_factor: Tensor | float = 1.0,
    ) -> None:
        """Give each row of the coming batches its own setting, instead of the tiers'.

        Parameters
        ----------
        inv_freq
            `[B, R/2]` or `[R/2]` for all rows, radians per token. float64 (other dtypes are
            converted). Gradients flow into it. By layer and group of heads `[L, B or 1, G, R/2]`.
        start_tokens
            int or int64 `[B]`: positions below it keep the model's original frequencies.
        attention_factor
            float or tensor `[B]` or `[]`. Gradients flow into it. By layer and group of heads
            `[L, B or 1, G]`.

        Raises
        ------
        ValueError
            Where a shape does not fit. That the batch has `B` rows is seen only when it comes.
        """
        half = self.base_bits.shape[0]
        inv_freq = torch.as_tensor(inv_freq, dtype=torch.float64)
        if inv_freq.ndim == 4:
            self.rows = self._rows_by_layer(inv_freq, start_tokens, attention_factor)
            return
        if inv_freq.ndim not in (1, 2) or inv_freq.shape[-1] != half:
            raise ValueError(
                f"inv_freq: expected [{half}] or [B, {half}], got {list(inv_freq.shape)}"
            )
        starts = torch.as_tensor(start_tokens, dtype=torch.int64)
        factors = torch.as_tensor(attention_factor, dtype=torch.float64)
        for name, given in (("start_tokens", starts), ("attention_factor", factors)):
            if given.ndim > 1:
                raise ValueError(f"{name}: expected one value or [B], got {list(given.shape)}")
        counts = [inv_freq.numel() // half, starts.numel(), factors.numel()]
        if len(set(counts) - {1}) > 1:
            raise ValueError(
                "inv_freq, start_tokens, attention_factor: expected the same number of rows "
                f"where it is not 1, got {counts[0]}, {counts[1]} and {counts[2]}"
            )
        rows = max(counts)
        self.rows = (inv_freq.expand(rows, half), starts.expand(rows), factors.expand(rows))

    def _rows_by_layer(
        self, inv_freq: Tensor, start_tokens: Tensor | int, attention_factor: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        half, rows = self.base_bits.shape[0], inv_freq.shape[1]
        factors = torch.as_tensor(attention_factor, dtype=torch.float64)
        if factors.ndim == 0:
            factors = factors.expand(inv_freq.shape[:3])
        if inv_freq.shape[-1] != half or factors.shape != inv_freq.shape[:3]:
            raise ValueError(
                f"inv_freq, attention_factor: expected [L, B, G, {half}] and [L, B, G], got "
                f"{list(inv_freq.shape)} and {list(factors.shape)}"
            )
        starts = torch.as_tensor(start_tokens, dtype=torch.int64)
        if starts.ndim > 1 or starts.numel() not in (1, rows):
            raise ValueError(
                f"start_tokens: expected one value or [{rows}], got {list(starts.shape)}"
            )
        return inv_freq, starts.expand(rows), factors

    def clear_rows(self) -> None:
        """Go back to the tiers."""
        self.rows = None

    def tier_of(self, lengths: Tensor) -> Tensor:
        """Return the tier of rows of `lengths` `[B]` tokens: the first that is long enough."""
        tier = torch.searchsorted(self.limits.to(lengths.device), lengths)
        return tier.clamp(max=len(self.tiers) - 1)  # off the end: the longest

    def _settings(self, positions: Tensor) -> tuple[Tensor, int | Tensor, float | Tensor]:
        """Return frequencies `[R/2]` or `[B, R/2]`, start tokens and attention factors."""
        device = positions.device
        if self.rows is not None:
            return tuple(setting.to(device) for setting in self.rows)
        inv_freq = self.inv_freq_bits.to(device).view(torch.float64)
        by_layer = inv_freq.ndim == 4
        if len(self.tiers) == 1 and not by_layer:  # plain numbers: no look into a tensor
            return inv_freq[0], self.tiers[0].start_tokens, self.tiers[0].attention_factor
        factors = self.factor_bits.to(device).view(torch.float64)
        if len(self.tiers) == 1:
            return inv_freq.transpose(0, 1), self.tiers[0].start_tokens, factors.transpose(0, 1)
        tier = self.tier
        if tier is None:
            lengths = self.planned_lengths
            tier = self.tier_of(positions.amax(-1).reshape(-1) + 1 if lengths is None else lengths)
        tier = tier.to(device)
        inv_freq, factors = inv_freq[tier], factors[tier]
        if by_layer:
            inv_freq, factors = inv_freq.transpose(0, 1), factors.transpose(0, 1)
        return inv_freq, self.start_tokens.to(device)[tier], factors

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None, **_
    ) -> tuple[KernelRotation | TableRotation, None]:
        """Return what the attention layers unpack as `cos, sin = position_embeddings`.

        For layer types that have a rotary embedding of their own beside the full-attention layers'
        (sliding ones), what the model's own module returns.

        x
            Hidden states `[B, N, E]`, for their shape, dtype and device.
        position_ids
            int64 `[B or 1, N]`.
        layer_type
            As a model with a rotary embedding for each layer type says it.
        """
        if layer_type not in (None, "full_attention"):
            return self.original(x, position_ids, layer_type)
        batch = x.shape[0]
        positions = position_ids.to(x.device)
        inv_freq, start_tokens, attention_factor = self._settings(positions)
        rows = 1 if inv_freq.ndim == 1 else inv_freq.shape[-2 if inv_freq.ndim == 2 else 1]
        if rows not in (1, batch):
            raise ValueError(
                f"inv_freq: expected one row, or one for each of the {batch} rows of the batch, "
                f"got {rows}"
            )
        if isinstance(start_tokens, Tensor) and rows == 1 and inv_freq.ndim == 4:
            start_tokens = start_tokens.expand(batch)
        if inv_freq.ndim == 2 and inv_freq.shape[0] == 1:
            inv_freq, start_tokens, attention_factor = (
                inv_freq[0], start_tokens.expand(batch), attention_factor[0]
            )  # fmt: skip
        if positions.shape[0] == 1:
            positions = positions[0]
        base = self.base_bits.to(x.device).view(torch.float64)
        arguments = KernelRotation(positions, inv_freq, start_tokens, base, attention_factor)
        if x.device.type in DEVICES_WITH_KERNELS:
            return arguments, None
        return tabulate(arguments, torch.promote_types(x.dtype, torch.float32)), None
