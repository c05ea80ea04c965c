"""Perplexity by range of positions: of the model as it was, and after each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from longrope._numbers import from_json, to_json
from longrope.checkpoints import Measured
from longrope.checkpoints.measured import Row
from longrope.evaluation.perplexity import perplexity


def measure(
    name: str,
    model: nn.Module,
    documents: Sequence[torch.Tensor],
    ranges: Sequence[tuple[int, int]],
    *,
    length: int | None = None,
    bos: str | bool | int = "auto",
) -> Row:
    """Measure a model as it stands: windows of `length` tokens that do not overlap.

    None: the end of the last range. Ranges beyond `length` are NaN, and so is the whole then. `bos`
    as for `longrope.perplexity`.
    """
    target = ranges[-1][1]
    length = length or target
    inside = [pair for pair in ranges if pair[1] <= length]
    found = perplexity(model, documents, length=length, stride=length, ranges=inside, bos=bos)
    missing = (math.nan,) * (len(ranges) - len(inside))
    return Row(name, found.by_range + missing, math.nan if missing else float(found))


def excerpts(
    documents: Sequence[torch.Tensor], length: int, most: int, seed: int
) -> list[torch.Tensor]:
    """Return one window of `length` tokens of each of up to `most` documents, at random."""
    random = np.random.default_rng([seed, 3])
    chosen = random.permutation(len(documents))[:most]
    windows = []
    for index in sorted(chosen.tolist()):
        start = int(random.integers(len(documents[index]) - length + 1))
        windows.append(documents[index][start : start + length])
    return windows


def table_of(
    rows: Sequence[Row], ranges: Sequence[tuple[int, int]], documents: Sequence[torch.Tensor]
) -> Measured:
    """Put rows together as the card of an export shows them."""
    length = ranges[-1][1]
    return Measured(
        length, tuple(ranges), tuple(rows), len(documents), len(documents) * (length - 1)
    )


def row_as_json(row: Row) -> dict:
    """Return a row for the journal: None in the place of NaN, "inf" in that of infinity."""
    values = to_json([None if v != v else v for v in (*row.by_range, row.overall)])
    return {"name": row.name, "by_range": values[:-1], "overall": values[-1]}


def row_from_json(entry: dict) -> Row:
    """Return the row that `row_as_json` stored."""
    values = from_json([*entry["by_range"], entry["overall"]])
    *by_range, overall = (math.nan if v is None else v for v in values)
    return Row(entry["name"], tuple(by_range), overall)
