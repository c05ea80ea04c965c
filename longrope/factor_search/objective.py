"""What a search measures: windows of documents, fixed for the whole run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def draw_windows(
    documents: Sequence[torch.Tensor], length: int, count: int, random: np.random.Generator
) -> torch.Tensor:
    """Draw up to `count` windows of `length` tokens that do not overlap: int64 `[S, length]`.

    Documents come in random order, one window of each, at a random place; only when every document
    has given a window does the next round begin, from those long enough to hold another. So a
    window after the first `len(documents)` shares its document with an earlier one, never a token.
    """
    order = random.permutation(len(documents))
    places = {index: _disjoint_starts(len(documents[index]), length, random) for index in order}
    chosen: list[torch.Tensor] = []
    for turn in range(max(map(len, places.values()))):
        for index in order:
            if len(chosen) == count:
                return torch.stack(chosen)
            if turn < len(places[index]):
                start = places[index][turn]
                chosen.append(documents[index][start : start + length])
    return torch.stack(chosen)


def _disjoint_starts(size: int, length: int, random: np.random.Generator) -> list[int]:
    """Place as many windows as fit, the spare tokens spread at random, in random order."""
    fitting = size // length
    # Where the windows begin if each had length 0: sorted draws from the spare room.
    gaps = np.sort(random.integers(0, size - fitting * length, size=fitting, endpoint=True))
    starts = gaps + length * np.arange(fitting)
    return [int(start) for start in random.permutation(starts)]


def digest(windows: torch.Tensor | None) -> str | None:
    """Return a hash of the windows' tokens, by which a journal knows its data."""
    if windows is None:
        return None
    shape = repr(tuple(windows.shape)).encode()
    return hashlib.sha256(shape + windows.contiguous().numpy().tobytes()).hexdigest()[:16]
