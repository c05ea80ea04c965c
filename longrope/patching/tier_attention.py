"""Attention under tiers by position: every query by its own tier, all of its keys by the same.

A pass goes segment by segment, a segment being consecutive tokens of one tier: the keys held so
far are turned into the tier, the segment's own keys join them, and the segment's queries attend.
That is what generation does token by token, so a cut of the prefill changes nothing. The first
tier turns by the model's own rotary module, with its angles and its casts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longrope import ops
from longrope.ops._segments import Segment as KernelSegment
from longrope.ops._segments import attend_segments
from longrope.patching import plain_attention
from longrope.patching.rotation import DEVICES_WITH_KERNELS, KernelRotation, tabulate
from longrope.patching.tier_cache import UNROTATED, Cached
from longrope.patching.tier_pass import Segment
from longrope.patching.tier_rotation import Unturned
from longrope.patching.torch_attention import Options, attend_by_torch

#: Tokens whose keys are un-turned at a time when a row leaves the first tier, in float32.
_UNTURNED_AT_A_TIME = 4096


def attend(
    query: Unturned, key: Unturned | Cached, value: Tensor, rotary: nn.Module, options: Options,
    index: int,
) -> Tensor:  # fmt: skip
    """Return the attention of a pass in layer `index`, `[B, H, N, D]`; a cache takes its keys."""
    rows = _Rows(query, key, value, rotary, options, index)
    layer = rows.layer
    if layer is not None and layer.is_quantized:
        with torch.no_grad():
            form, storage = layer.exchange(key.new.states, value, query.rotation.positions)
        if rows.needs_gradient:
            return rows.differentiable((*storage, form) if rows.start else None)
        return rows.through(form, storage)
    if layer is not None:
        with torch.no_grad():
            held = rows.held_before() if rows.needs_gradient else None
            out = rows.through_the_cache()
        return rows.differentiable(held) if rows.needs_gradient else out
    if rows.needs_gradient or rows.plan.documents:
        return rows.differentiable(None)
    return rows.through(*rows.without_cache())


class _Rows:
    """The attention of one layer in one pass."""

    def __init__(
        self, query: Unturned, key: Unturned | Cached, value: Tensor, rotary: nn.Module,
        options: Options, index: int,
    ):  # fmt: skip
        cached = isinstance(key, Cached)
        self.layer = key.layer if cached else None
        self.start = int(key.start) if cached else 0
        self.query, self.key, self.value = query, key.new if cached else key, value
        self.rotary, self.options, self.index = rotary, options, index
        self.rotation = query.rotation
        self.plan = query.rotation.plan
        self.first_by_model = rotary.first_by_model
        self.needs_gradient = torch.is_grad_enabled() and any(
            x.requires_grad for x in (query.states, self.key.states, value)
        )

    # --- through the cache, in place ----------------------------------------------------------

    def through_the_cache(self) -> Tensor:
        """Turn what is held, let new keys join, attend: in place, without gradients."""
        if self._is_steady():
            return self._steady()
        end = self.start + self.value.shape[2]
        form, storage = self.layer.form, self.layer.storage()
        storage[1][:, :, self.start : end] = self.value
        storage[2][:, self.start : end] = self.rotation.positions
        return self.through(form, storage)

    def without_cache(self) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the form, and room for the keys, of a pass that has no cache."""
        key = self.key.states
        form = torch.zeros(len(key), dtype=torch.int64)
        return form, (torch.empty_like(key), self.value, self.rotation.positions)

    def through(self, form: Tensor, storage: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Let the segments of the pass attend, one after another.

        `storage` has keys and values `[B, Hk, n, D]` and positions `[B, n]`: what is held, its keys
        in `form`, then the tokens of the pass, whose keys are written here. Both change in place.
        """
        out = torch.empty_like(self.query.states)
        for rows, segments in self._groups():
            keys, values, positions = (x[rows] for x in storage)
            for segment in segments:
                tiers = self._tiers(rows, segment)
                begin = self.start + segment.begin
                stop = self.start + segment.end
                if self.start or segment.begin:
                    self._turn_held(keys[:, :, :begin], positions[:, :begin], form, rows, tiers)
                form[rows] = torch.tensor([self._form(t) for t in tiers])
                keys[:, :, begin:stop] = self._turned(self.key, rows, segment, tiers, cached=True)
                seen = keys[:, :, :stop]
                if self.rotary.keeps_unrotated and any(tiers):
                    seen = self._read(seen, positions[:, :stop], tiers, rows.start or 0)
                out[rows, :, segment.begin : segment.end] = self._attention(
                    self._turned(self.query, rows, segment, tiers), seen, values[:, :, :stop], rows
                )
        return out

    def _is_steady(self) -> bool:
        """Say whether one tier of ours holds all tokens, and the cache is in its form already.

        Nearly every token that is generated: worth a way of its own.
        """
        tier, layer = self.plan.tier, self.layer
        if layer is None or tier is None or self.rotary.keeps_unrotated:
            return False
        if (tier == 0 and self.first_by_model) or not _has_kernels(self.value):
            return False
        return not self.start or layer.form.tolist() == [tier] * len(self.value)

    def _steady(self) -> Tensor:
        """Do what `through_the_cache` does where `_is_steady`."""
        keys, values, positions = self.layer.storage()
        at = self.rotation.positions
        end = self.start + at.shape[1]
        rotation = KernelRotation(self._real(at, 0), *self.rotation.settings)
        query, new = rotation.of_layer(self.index).rotate(self.query.states, self.key.states)
        keys[:, :, self.start : end] = new
        values[:, :, self.start : end] = self.value
        positions[:, self.start : end] = at
        self.layer.form.fill_(self.plan.tier)
        return self._attention(query, keys[:, :, :end], values[:, :, :end], slice(None))

    def _groups(self) -> Iterator[tuple[slice, tuple[Segment, ...]]]:
        """Yield rows that go together, and their segments."""
        segments = self.plan.rows
        if self.plan.uniform or self.plan.single:
            yield slice(None), segments[0]
            return
        for row, these in enumerate(segments):
            yield slice(row, row + 1), these

    def _tiers(self, rows: slice, segment: Segment) -> list[int]:
        """Return the tier of each row of a group in a segment."""
        if self.plan.single:
            return [row[0].tier for row in self.plan.rows[rows]]
        return [segment.tier] * len(self.plan.rows[rows])

    def _form(self, tier: int) -> int:
        """Return the form in which keys are held while their row is in a tier."""
        return UNROTATED if self.rotary.keeps_unrotated and tier > 0 else tier

    def _turn_held(
        self, keys: Tensor, positions: Tensor, form: Tensor, rows: slice, tiers: list[int]
    ) -> None:
        """Turn keys `[b, Hk, n, D]` that are held into the form of the rows' tiers, in place."""
        before = form[rows].tolist()
        pairs = [(old, self._form(tier)) for old, tier in zip(before, tiers, strict=True)]
        for (old, new), these in _runs(pairs):
            if old != new:
                row = (rows.start or 0) + these.start
                self._turn(keys[these], positions[these], old, new, row)

    def _turn(self, keys: Tensor, positions: Tensor, old: int, new: int, row: int) -> None:
        """Turn keys from one form into another, in place, with one rounding."""
        by_model = [f == 0 and self.first_by_model for f in (old, new)]
        if not any(by_model) and UNROTATED not in (old, new) and _has_kernels(keys):
            sets = (self.rotary.tiers[form].layer(self.index) for form in (old, new))
            ops.rerotate(keys, self._real(positions, row), *sets, out=keys)
            return
        for first in range(0, keys.shape[2], _UNTURNED_AT_A_TIME):
            part = slice(first, first + _UNTURNED_AT_A_TIME)
            some, at = keys[:, :, part], positions[:, part]
            plain = some.to(torch.promote_types(some.dtype, torch.float32))
            if by_model[0]:
                plain = self._unturned_by_model(plain, some, at)
            elif old != UNROTATED:
                plain = self._turned_by(plain, at, self.rotary.settings(old), row, back=True)
            if by_model[1]:
                cos, sin = self.rotary.model_tables(some, at)
                plain = self.key.turn(plain.to(some.dtype), cos, sin)
            elif new != UNROTATED:
                plain = self._turned_by(plain, at, self.rotary.settings(new), row)
            some.copy_(plain)

    def _unturned_by_model(self, wide: Tensor, like: Tensor, positions: Tensor) -> Tensor:
        """Turn keys back by the angles of the model's own rotary module, as it casts them."""
        cos, sin = (t.to(wide.dtype) for t in self.rotary.model_tables(like, positions))
        norm = cos.square() + sin.square()
        return self.key.turn(wide, cos / norm, -sin / norm)

    def _read(self, keys: Tensor, positions: Tensor, tiers: list[int], row: int) -> Tensor:
        """Return un-rotated keys turned by the tiers of their rows; rows of the first as they are.

        `row` is the place of the first of them in the batch.
        """
        turned = keys.clone() if 0 in tiers else torch.empty_like(keys)
        for tier, these in _runs(tiers):
            if tier:
                turned[these] = self._turned_by(
                    keys[these], positions[these], self.rotary.settings(tier), row + these.start
                )
        return turned

    # --- as functions, with gradients ---------------------------------------------------------

    def held_before(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return copies of what the cache holds before the pass: constants for the gradient."""
        if not self.start:
            return None
        keys, values, positions = (x.clone() for x in self.layer.storage())
        return keys, values, positions, self.layer.form.clone()

    def differentiable(self, held: tuple[Tensor, Tensor, Tensor, Tensor] | None) -> Tensor:
        """Attend with nothing written in place; also for documents packed into a row."""
        parts = []
        for rows, segments in self._groups_by_document():
            outs = {} if held is not None else self._together(rows, segments)
            for index, (document, segment) in enumerate(segments):
                if index not in outs:
                    outs[index] = self._one_by_one(rows, document, segment, held)
            parts.append(torch.cat([outs[index] for index in range(len(segments))], 2))
        return torch.cat(parts)

    def _together(self, rows: slice, segments: list[tuple[int, Segment]]) -> dict[int, Tensor]:
        """Return the attention of the segments that our kernels turn and attend, by their index.

        Not of those that the model turns, nor where torch is faster.
        """
        if self.plan.mask is not None or not _has_kernels(self.value):
            return {}
        found: dict[int, KernelSegment] = {}
        q, k, v = (x[rows] for x in (self.query.states, self.key.states, self.value))
        for index, (document, segment) in enumerate(segments):
            tier, *others = set(self._tiers(rows, segment))
            if others or (tier == 0 and self.first_by_model):
                continue
            seen = slice(document, segment.end)
            bounds = {}
            if self.plan.key_start is not None:
                bounds = self._bounds(rows, segment.end)
            elif self._torch_is_faster(q[:, :, segment.begin : segment.end], k[:, :, seen], v):
                continue
            positions = self._real(self.rotation.positions[rows, seen], rows.start or 0)
            turn = KernelRotation(positions, *self.rotary.settings(tier)).of_layer(self.index)
            found[index] = KernelSegment(segment.begin, segment.end, document, *turn, **bounds)
        if not found:
            return {}
        attended = attend_segments(q, k, v, list(found.values()), **vars(self.options))
        return dict(zip(found, attended, strict=True))

    def _torch_is_faster(self, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        o = self.options
        return plain_attention.takes_torch(query, keys, values, window=o.window, softcap=o.softcap)

    def _one_by_one(
        self, rows: slice, document: int, segment: Segment,
        held: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """Return the attention of one segment, each step of it a function of its own."""
        tiers = self._tiers(rows, segment)
        keys = self._turned(self.key, rows, Segment(segment.tier, document, segment.end), tiers)
        values = self.value[rows, :, document : segment.end]
        if held is not None:
            before, old_values, positions, form = held
            before = before[rows, :, : self.start].clone()
            with torch.no_grad():
                self._turn_held(before, positions[rows, : self.start], form, rows, tiers)
                if self.rotary.keeps_unrotated and any(tiers):
                    before = self._read(
                        before, positions[rows, : self.start], tiers, rows.start or 0
                    )
            keys = torch.cat([before, keys], 2)
            values = torch.cat([old_values[rows, :, : self.start], values], 2)
        query = self._turned(self.query, rows, segment, tiers)
        return self._attention(query, keys, values, rows, document)

    def _groups_by_document(self) -> Iterator[tuple[slice, list[tuple[int, Segment]]]]:
        """Yield rows that go together, and their segments with the begin of their document."""
        documents = self.plan.documents
        groups = self._groups()
        if documents and len(set(documents)) > 1 and self.plan.uniform:
            groups = ((slice(r, r + 1), s) for r, s in enumerate(self.plan.rows))
        for rows, segments in groups:
            starts = (0, *documents[rows.start or 0]) if documents else (0,)
            yield rows, [(max(s for s in starts if s <= x.begin), x) for x in segments]

    # --- one segment --------------------------------------------------------------------------

    def _turned(
        self, what: Unturned, rows: slice, segment: Segment, tiers: list[int], cached: bool = False
    ) -> Tensor:
        """Return the states of a segment turned by the tiers of their rows."""
        part = slice(segment.begin, segment.end)
        states, rotation = what.states[rows, :, part], self.rotation
        positions = rotation.positions[rows, part]
        keep = cached and self.rotary.keeps_unrotated

        def turned(these: slice, tier: int) -> Tensor:
            if tier == 0 and self.first_by_model:
                tables = (t[rows] if len(t) > 1 else t for t in (rotation.cos, rotation.sin))
                cos, sin = (t[these, part] if len(t) > 1 else t[:, part] for t in tables)
                return what.turn(states[these], cos, sin)
            if tier and keep:
                return states[these]
            row = (rows.start or 0) + these.start
            return self._turned_by(states[these], positions[these], self.rotary.settings(tier), row)

        parts = [turned(these, tier) for tier, these in _runs(tiers)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _turned_by(
        self, x: Tensor, positions: Tensor, settings: tuple, row: int, back: bool = False
    ) -> Tensor:
        """Turn states by one tier's settings, or back; `row` is the first one's in the batch."""
        inv_freq, start_tokens, base, factor = settings
        positions = self._real(positions, row)
        if back:
            inv_freq, base, factor = -inv_freq, -base, 1 / factor
        arguments = KernelRotation(positions, inv_freq, start_tokens, base, factor)
        arguments = arguments.of_layer(self.index)
        if _has_kernels(x):
            return arguments.rotate(x, x[:, :0])[0]
        return tabulate(arguments, torch.promote_types(x.dtype, torch.float32)).rotate(x, x)[0]

    def _real(self, positions: Tensor, row: int) -> Tensor:
        """Return positions that do not count the padding before a row, as tiers do."""
        shift = self.rotation.shift
        return positions if shift is None else positions - shift[row : row + len(positions), None]

    def _attention(
        self, query: Tensor, keys: Tensor, values: Tensor, rows: slice, document: int = 0
    ) -> Tensor:
        """Attend the last queries to keys: ours, or torch's where that can do it."""
        o, plan, end = self.options, self.plan, document + keys.shape[2]
        if plan.mask is not None or not _has_kernels(query):
            mask = plan.mask
            if mask is None and plan.key_start is not None:
                mask = self._mask_of_bounds(end)
            return attend_by_torch(
                query, keys, values, mask if mask is None else mask[rows, :end], o
            )
        if plan.key_start is None:
            return plain_attention.attend(query, keys, values, **vars(o))
        return ops.attention(query, keys, values, **vars(o), **self._bounds(rows, end))

    def _bounds(self, rows: slice, end: int) -> dict[str, Tensor]:
        """Return which of the first `end` keys exist, as `ops.attention` takes it."""
        return {
            name: torch.tensor([min(x, end) for x in of_rows[rows]], device=self.value.device)
            for name, of_rows in (
                ("key_start", self.plan.key_start), ("key_length", self.plan.key_length)
            )
        }  # fmt: skip

    def _mask_of_bounds(self, end: int) -> Tensor:
        """Return which of the first `end` keys exist, bool `[B, end]`."""
        device = self.query.device
        key = torch.arange(end, device=device)
        first, length = (
            torch.tensor(x, device=device)[:, None]
            for x in (self.plan.key_start, self.plan.key_length)
        )
        return (key >= first) & (key < length)


def _runs(values: list) -> Iterator[tuple[Any, slice]]:
    """Yield each run of equal neighbours, and where it lies."""
    for value, run in itertools.groupby(range(len(values)), values.__getitem__):
        places = list(run)
        yield value, slice(places[0], places[-1] + 1)


def _has_kernels(x: Tensor) -> bool:
    return x.device.type in DEVICES_WITH_KERNELS
