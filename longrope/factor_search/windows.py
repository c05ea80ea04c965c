"""What a search measures: windows of documents, fixed for the whole run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope.documents import as_documents
from longrope.evaluation.modes import vocabulary
from longrope.evaluation.needles import plant


@dataclass(frozen=True)
class WindowsByRole:
    """The windows of a search, and the documents that steps draw theirs from.

    Attributes
    ----------
    windows
        int64 `[S, length]` on the CPU, by role: `"search"`, and `"validation"` and `"screen"` (the
        first of the search windows) where there are any.
    documents
        What the windows were drawn from.
    held_out
        Places in `documents` of validation windows.
    needles
        Where random numbers for needles come from; None: windows of plain text.
    """

    windows: dict[str, torch.Tensor]
    documents: list[torch.Tensor]
    held_out: list[tuple[int, int]]
    length: int
    needles: np.random.Generator | None = None

    @classmethod
    def draw(
        cls,
        model: nn.Module,
        documents: Iterable[Any],
        validation: Iterable[Any] | None,
        length: int,
        samples: int,
        random: np.random.Generator,
        random_validation: np.random.Generator,
        *,
        screened: int,
        needles: np.random.Generator | None = None,
    ) -> WindowsByRole:
        """Draw the windows of each role, and plant needles where asked.

        With `screened` of 0 (evolution), validation takes what the search windows leave; else it
        gets half of the windows where there are fewer than `2 * samples`.
        """
        vocab_size = vocabulary(model)
        documents = as_documents(documents, min_length=length, vocab_size=vocab_size)
        if validation is not None:
            validation = as_documents(
                validation, min_length=length, vocab_size=vocab_size, name="validation"
            )
            held_out = draw_windows(validation, length, len(validation), random_validation)
            windows = {"search": draw_windows(documents, length, samples, random)}
            windows["validation"] = held_out
            places = []
        else:
            places = place_windows(documents, length, 2 * samples, random)
            first = min(samples, (len(places) + 1) // 2) if screened else samples
            windows = {"search": cut_windows(documents, length, places[:first])}
            places = places[first:]
            if places:
                windows["validation"] = cut_windows(documents, length, places)
        if needles is not None:
            windows = {role: plant(text, needles) for role, text in windows.items()}
        if 0 < screened < len(windows["search"]):
            windows["screen"] = windows["search"][:screened]
        return cls(windows, documents, places, length, needles)

    def random(self, random: np.random.Generator) -> RandomWindows:
        """Return windows without end that share no text with a validation window."""
        return RandomWindows(self.documents, self.length, self.held_out, random, self.needles)

    def digest(self) -> str:
        """Return a hash of the documents."""
        return hashlib.sha256(" ".join(digest(d) for d in self.documents).encode()).hexdigest()[:16]


def draw_windows(
    documents: Sequence[torch.Tensor], length: int, count: int, random: np.random.Generator
) -> torch.Tensor:
    """Draw up to `count` windows of `length` tokens that do not overlap: int64 `[S, length]`.

    Documents come in random order, one window of each, at a random place; only when every document
    has given a window does the next round begin, from those long enough to hold another. So a
    window after the first `len(documents)` shares its document with an earlier one, never a token.
    """
    return cut_windows(documents, length, place_windows(documents, length, count, random))


def place_windows(
    documents: Sequence[torch.Tensor], length: int, count: int, random: np.random.Generator
) -> list[tuple[int, int]]:
    """Return `(document, start)` of the windows that `draw_windows` draws."""
    order = [int(index) for index in random.permutation(len(documents))]
    starts = {index: _disjoint_starts(len(documents[index]), length, random) for index in order}
    rounds = range(max(map(len, starts.values())))
    places = [
        (index, starts[index][turn])
        for turn in rounds
        for index in order
        if turn < len(starts[index])
    ]
    return places[:count]


def cut_windows(
    documents: Sequence[torch.Tensor], length: int, places: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Return the windows at places `(document, start)`: int64 `[S, length]`."""
    return torch.stack([documents[index][start : start + length] for index, start in places])


class RandomWindows:
    """Windows without end: at random places of the documents, away from held-out windows.

    Documents come in random order, and in another random order when all had their turn.

    Parameters
    ----------
    documents
        1-D token ids, at least one of which has room for a window beside the held-out ones.
    length
        Tokens of a window.
    held_out
        Places `(document, start)` of windows of the same length, no token of which may appear.
    random
        Source of the order and of the places.
    needles
        Source of needles; None: plain text.
    """

    def __init__(
        self,
        documents: Sequence[torch.Tensor],
        length: int,
        held_out: Sequence[tuple[int, int]],
        random: np.random.Generator,
        needles: np.random.Generator | None = None,
    ):
        self.length = length
        self.needles = needles
        self.random = random
        self._order: list[int] = []
        self._documents = []
        for index, document in enumerate(documents):
            starts = np.arange(len(document) - length + 1)
            for where, start in held_out:
                if where == index:
                    starts = starts[(starts + length <= start) | (starts >= start + length)]
            if len(starts):
                self._documents.append((document, starts))

    def draw(self, count: int) -> torch.Tensor:
        """Return the next `count` windows: int64 `[count, length]`."""
        windows = []
        for _ in range(count):
            if not self._order:
                self._order = [int(i) for i in self.random.permutation(len(self._documents))]
            document, starts = self._documents[self._order.pop()]
            start = int(starts[self.random.integers(len(starts))])
            windows.append(document[start : start + self.length])
        drawn = torch.stack(windows)
        return drawn if self.needles is None else plant(drawn, self.needles)


def _disjoint_starts(size: int, length: int, random: np.random.Generator) -> list[int]:
    """Place as many windows as fit, the spare tokens spread at random, in random order."""
    fitting = size // length
    # Where the windows begin if each had length 0: sorted draws from the spare room.
    gaps = np.sort(random.integers(0, size - fitting * length, size=fitting, endpoint=True))
    starts = gaps + length * np.arange(fitting)
    return [int(start) for start in random.permutation(starts)]


def scored_tokens(windows: torch.Tensor, last_tokens: int | None) -> int:
    """Return how many tokens at the end of each window are scored: at most all but the first."""
    most = windows.shape[1] - 1
    return most if last_tokens is None else min(last_tokens, most)


def digest(windows: torch.Tensor) -> str:
    """Return a hash of the windows' tokens, by which a journal knows its data."""
    shape = repr(tuple(windows.shape)).encode()
    return hashlib.sha256(shape + windows.contiguous().numpy().tobytes()).hexdigest()[:16]
