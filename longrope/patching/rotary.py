"""The rotary module that takes the place of a model's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longrope.factors import RescaleFactors
from longrope.patching.rotation import CosSin


class Rows(NamedTuple):
    """One setting for each row of a batch (or one row for all).

    inv_freq : float64 `[B, R/2]`, radians per token
    start_tokens : int64 `[B]`
    attention_factor : float64 `[B]`
    """

    inv_freq: Tensor
    start_tokens: Tensor
    attention_factor: Tensor


class RescaledRotaryEmbedding(nn.Module):
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
        # float64 kept as int64 bits: model.to(bfloat16) and half() leave integer buffers alone.
        # Non-persistent: the state dict keeps its keys.
        self._put("inv_freq_bits", np.stack([f.inv_freq() for f in tiers]).view(np.int64))
        self._put("base_bits", tiers[0].base_inv_freq().view(np.int64))
        self._put("factor_bits", np.array([f.attention_factor for f in tiers]).view(np.int64))
        self._put("start_tokens", np.array([f.start_tokens for f in tiers], np.int64))
        self._put("limits", np.array([f.target_length for f in tiers], np.int64))
        self._rows: Rows | None = None
        self._lengths: Tensor | None = None

    def _put(self, name: str, values: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(values.copy()), persistent=False)

    def extra_repr(self) -> str:
        """Name the lengths, for `print(model)`."""
        return "tiers up to " + ", ".join(str(f.target_length) for f in self.tiers) + " tokens"

    # --- settings of the rows ---------------------------------------------------------------------

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
            converted). Gradients flow into it.
        start_tokens
            int or int64 `[B]`: positions below it keep the model's original frequencies.
        attention_factor
            float or tensor `[B]` or `[]`. Gradients flow into it.

        Raises
        ------
        ValueError
            Where a shape does not fit. That the batch has `B` rows is seen only when it comes.
        """
        half = self.base_bits.shape[0]
        inv_freq = torch.as_tensor(inv_freq, dtype=torch.float64)
        if inv_freq.ndim not in (1, 2) or inv_freq.shape[-1] != half:
            raise ValueError(
                f"inv_freq: expected [{half}] or [B, {half}], got {list(inv_freq.shape)}"
            )
        starts = torch.as_tensor(start_tokens, dtype=torch.int64)
        factors = torch.as_tensor(attention_factor, dtype=torch.float64)
        for name, given in (("start_tokens", starts), ("attention_factor", factors)):
            if given.ndim > 1:
                raise ValueError(f"{name}: expected one value or [B], got {list(given.shape)}")
        counts = {len(inv_freq.reshape(-1, half)), starts.numel(), factors.numel()}
        if len(counts - {1}) > 1:
            raise ValueError(
                "inv_freq, start_tokens, attention_factor: expected the same number of rows "
                f"where it is not 1, got {len(inv_freq.reshape(-1, half))}, {starts.numel()} "
                f"and {factors.numel()}"
            )
        count = max(counts)
        self._rows = Rows(inv_freq.expand(count, half), starts.expand(count), factors.expand(count))

    def clear_rows(self) -> None:
        """Go back to the tiers."""
        self._rows = None

    def rows_for(self, position_ids: Tensor) -> Rows:
        """Return the settings of a batch whose tokens stand at `position_ids` `[B or 1, N]`."""
        device = position_ids.device
        if self._rows is not None:
            return Rows(*(t.to(device) for t in self._rows))
        inv_freq = self.inv_freq_bits.to(device).view(torch.float64)
        factors = self.factor_bits.to(device).view(torch.float64)
        starts = self.start_tokens.to(device)
        if len(self.tiers) == 1:
            return Rows(inv_freq, starts, factors)
        lengths = self._lengths
        if lengths is None:
            lengths = position_ids.amax(dim=-1) + 1
        # The first limit that is >= the length; off the end: the last tier.
        tier = torch.searchsorted(self.limits.to(device), lengths.to(device))
        tier = tier.clamp(max=len(self.tiers) - 1)
        return Rows(inv_freq[tier], starts[tier], factors[tier])

    # --- the interface of transformers' rotary modules --------------------------------------------

    def forward(self, x: Tensor, position_ids: Tensor, **_) -> tuple[CosSin, None]:
        """Return what the attention layers unpack as `cos, sin = position_embeddings`.

        x
            Hidden states `[B, N, E]`, for their dtype and device.
        position_ids
            int64 `[B or 1, N]`.
        """
        positions = position_ids.to(x.device)
        rows = self.rows_for(positions)
        if len(rows.inv_freq) not in (1, x.shape[0]):
            raise ValueError(
                f"inv_freq: expected one row or one for each of the {x.shape[0]} rows of the "
                f"batch, got {len(rows.inv_freq)}"
            )
        table_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # float64 angles: off by 5e-10 rad at position 2^21, where float32 is off by 0.16 rad.
        # Autocast would not touch them: it casts no float64.
        frequency = rows.inv_freq[:, None, :]
        base = self.base_bits.to(x.device).view(torch.float64)
        early = positions[..., None] < rows.start_tokens[:, None, None]
        angle = positions[..., None] * torch.where(early, base, frequency)
        factor = rows.attention_factor[:, None, None]
        table = (angle.cos() * factor, angle.sin() * factor)
        return CosSin(*(t.to(table_dtype) for t in table)), None


@contextlib.contextmanager
def swapped(module: RescaledRotaryEmbedding, name: str, value) -> Iterator[None]:
    """Set an attribute for the length of a `with` block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
