"""One forward pass under tiers by position: which token takes which tier, decided before it runs.

The decoder's hooks look at the arguments of a pass once, on the host, and leave a `Plan`; the
rotary module hands the layers a `TieredRotation` that carries it. Nothing else is kept between the
hook and a layer, so a layer that is run again (activation checkpoints) finds what it had. Under
`torch.compile`, where nothing may be decided on the host, there is no plan: `tier_attention` then
runs as one opaque op that makes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: What stands before the name of a model's own attention implementation under tiers by position.
PREFIX = "longrope_"
#: The order of the arguments of a decoder's forward, where they come by position.
POSITIONAL = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds")


class Segment(NamedTuple):
    """Consecutive tokens `begin` to `end` of a pass that share a tier."""

    tier: int
    begin: int
    end: int


@dataclass(frozen=True)
class Plan:
    """What the tokens of one pass do.

    Attributes
    ----------
    tier
        The tier of all tokens, where they share one.
    rows
        For each row of the batch its segments, in order; they cover the pass.
    documents
        For each row where documents begin that are packed into it, the first left out: positions
        start again there, and attention does not cross. Empty for text that goes on.
    key_start, key_length
        For each row the first key that exists and the end of those that do, counted in the cache
        and the pass together; None where all do.
    mask
        bool `[B, M]`, where some of those between do not exist either.
    own
        Whether the model's own rotation and attention compute the whole pass.
    """

    tier: int | None
    rows: tuple[tuple[Segment, ...], ...]
    documents: tuple[tuple[int, ...], ...] = ()
    key_start: tuple[int, ...] | None = None
    key_length: tuple[int, ...] | None = None
    mask: Tensor | None = None
    own: bool = False

    @property
    def uniform(self) -> bool:
        """Whether all rows have the same segments."""
        return all(row == self.rows[0] for row in self.rows[1:])

    @property
    def single(self) -> bool:
        """Whether every row is one segment."""
        return all(len(row) == 1 for row in self.rows)


class Call(NamedTuple):
    """The arguments of a decoder's forward that decide a pass."""

    batch: int
    tokens: int
    cached: int
    positions: Tensor  # int64 [B, N], by which the model turns
    shift: Tensor | None  # int64 [B]: padding before the row that the positions count; None: none
    real: Tensor | None  # int64 [B, N]: positions among the tokens that exist, where not given
    mask: Tensor | None  # bool [B, cached + N], which keys exist; None: all
    may_pack: bool  # positions that start again begin another document
    cache: Any
    device: torch.device


def arguments_of(args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the arguments of a decoder's forward by the names of transformers 5.24.

    Before it, `cache` was `past_key_values`.
    """
    given = dict(zip(POSITIONAL, args, strict=False)) | kwargs
    if "past_key_values" in given:
        given.setdefault("cache", given.pop("past_key_values"))
    return given


def cache_argument(base: nn.Module) -> str:
    """Return the name of the cache among a decoder's arguments: `past_key_values` before 5.24."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def read_call(args: tuple, kwargs: dict) -> Call:
    """Read what a decoder is called with."""
    given = arguments_of(args, kwargs)
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    batch, count = tokens.shape[:2]
    cache = given.get("cache")
    # A static cache counts in a tensor that it goes on writing to: read it now.
    cached = 0 if cache is None else int(cache.get_seq_length())
    mask, shift, real = given.get("attention_mask"), None, None
    may_pack = mask is None  # as transformers has it
    mask = existing_keys(mask, cached, count)
    positions = given.get("position_ids")
    if positions is None:
        # As the model numbers them, padding too.
        positions = torch.arange(cached, cached + count, device=tokens.device)
        if mask is not None:
            counted = mask.cumsum(-1)
            shift = counted.eq(0).sum(-1)
            shift = shift if bool(shift.any()) else None
            real = (counted[:, cached:] - 1).clamp(min=0)
    positions = positions.reshape(-1, count).expand(batch, count)
    if mask is not None and bool(mask.all()):
        mask = None
    return Call(batch, count, cached, positions, shift, real, mask, may_pack, cache, tokens.device)


def existing_keys(mask: Any, cached: int, count: int) -> Tensor | None:
    """Return which keys exist, bool `[B, cached + count]`, from any mask of a decoder.

    `mask` is one of padding `[B, M]`, or of pairs `[B, 1, N, M]` as `generate` makes it for static
    caches (bool, or added to the scores), or such masks by layer type.

    Raises `ValueError` where a mask of pairs is more than causal attention to keys that exist.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask[:, : cached + count].bool()
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, :, -count:, : cached + count]
    exists = seen.any(-2).any(1)
    key = torch.arange(cached + count, device=mask.device)
    query = torch.arange(cached, cached + count, device=mask.device)[:, None]
    expected = (key <= query) & exists[:, None, None]
    real = exists[:, None, cached:, None]  # what padding sees is nobody's business
    if bool(((expected != seen) & real).any()):
        raise ValueError(
            "attention_mask: expected padding alone under tiers by position, got a mask of pairs "
            f"{list(mask.shape)} that is not causal"
        )
    return exists


def make_plan(call: Call, limits: Tensor) -> Plan:
    """Choose the tier of every token of a pass.

    `limits` is int64 `[T]` on the CPU, the tiers' `target_length`.
    """
    positions = call.positions.cpu()
    hidden = None if call.mask is None else ~call.mask[:, -call.tokens :].cpu()
    real = positions if call.real is None else call.real.cpu()
    tier = torch.searchsorted(limits, real.contiguous(), right=True).clamp_(max=len(limits) - 1)
    documents = ()
    if hidden is not None:
        tier = _without_padding(tier, hidden)
    elif call.may_pack and call.cache is None:
        documents = _documents(positions)
    bounds = () if call.mask is None else _bounds(call)
    least, most = (int(x) for x in tier.aminmax())
    if least == most and not documents:
        rows = ((Segment(least, 0, call.tokens),),) * call.batch
        return Plan(least, rows, (), *bounds)
    return Plan(None, _segments(tier, documents), documents, *bounds)


def _without_padding(tier: Tensor, hidden: Tensor) -> Tensor:
    """Give padding the tier of the token before it in its row, or of the first one after it."""
    known = tier.masked_fill(hidden, -1).cummax(-1).values
    none = torch.iinfo(torch.int64).max
    first = known.masked_fill(known < 0, none).amin(-1, keepdim=True)
    first = first.masked_fill(first == none, 0)  # a row of padding alone
    return torch.where(known < 0, first, known)


def _documents(positions: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return where positions start again in each row; empty where they do in none."""
    again = positions.diff(dim=-1) != 1
    if not again.any():
        return ()
    return tuple(tuple((row.nonzero().flatten() + 1).tolist()) for row in again)


def _segments(
    tier: Tensor, documents: tuple[tuple[int, ...], ...]
) -> tuple[tuple[Segment, ...], ...]:
    rows = []
    for index, row in enumerate(tier):
        tiers, counts = torch.unique_consecutive(row, return_counts=True)
        ends = counts.cumsum(0).tolist()
        begins = [0, *ends[:-1]]
        segments = [Segment(*s) for s in zip(tiers.tolist(), begins, ends, strict=True)]
        for start in documents[index] if documents else ():
            segments = _cut(segments, start)
        rows.append(tuple(segments))
    return tuple(rows)


def _cut(segments: list[Segment], at: int) -> list[Segment]:
    """Begin a new segment at a token."""
    parts = []
    for segment in segments:
        if segment.begin < at < segment.end:
            parts += [segment._replace(end=at), segment._replace(begin=at)]
        else:
            parts.append(segment)
    return parts


def _bounds(call: Call) -> tuple[tuple[int, ...], tuple[int, ...], Tensor | None]:
    """Return the first key of each row that exists, the end of those that do, and any holes."""
    seen = call.mask[:, : call.cached + call.tokens]
    mask = seen.cpu()
    width = mask.shape[1]
    start = mask.long().argmax(-1)  # of a row of padding alone: 0, and its length is 0
    length = width - mask.flip(-1).long().argmax(-1)
    length = torch.where(mask.any(-1), length, 0)
    holes = not torch.equal(mask.sum(-1), length - start)
    return tuple(start.tolist()), tuple(length.tolist()), seen if holes else None
