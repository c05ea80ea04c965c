"""What a search measures on: windows of documents, fixed for the whole run."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope.documents import as_documents
from longrope.evaluation.identity import digests
from longrope.evaluation.modes import vocabulary
from longrope.evaluation.needles import plant
from longrope.evaluation.start import with_bos, without_bos
from longrope.factor_search.history import Role


@dataclass(frozen=True)
class WindowsByRole:
    """The windows of a search, and the documents from which its steps draw windows.

    Attributes
    ----------
    windows
        int64 `[S, length]` on the CPU, by role: those of the search; and, where there are any,
        those for validation and the first few of the search.
    documents
        What the windows were drawn from.
    held_out
        The places in `documents` of validation windows.
    length
        Tokens of text in a window: without its BOS.
    needles
        The random numbers that plant needles; None: windows of plain text.
    bos
        The token in front of every window; None: windows of text alone.
    shown
        Random windows are cut to their first `shown` tokens of text; None: they stay whole.
    """

    windows: dict[Role, torch.Tensor]
    documents: list[torch.Tensor]
    held_out: list[tuple[int, int]]
    length: int
    needles: np.random.Generator | None = None
    bos: int | None = None
    shown: int | None = None

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
        bos: int | None = None,
    ) -> WindowsByRole:
        """Draw the windows of each role; with `needles`, plant them, with `bos`, put it in front.

        `screened` is the number of search windows that are a role of their own. Where the documents
        hold fewer than `2 * samples` windows, validation gets what `samples` search windows leave,
        or, with `screened` above 0, half of them.
        """
        vocab_size = vocabulary(model)
        documents = _texts(documents, length, vocab_size, bos, "documents")
        text = length if bos is None else length - 1
        if validation is not None:
            validation = _texts(validation, length, vocab_size, bos, "validation")
            held_out = draw_windows(validation, text, len(validation), random_validation)
            windows = {Role.SEARCH: draw_windows(documents, text, samples, random)}
            windows[Role.VALIDATION] = held_out
            places = []
        else:
            places = place_windows(documents, text, 2 * samples, random)
            first = min(samples, (len(places) + 1) // 2) if screened else samples
            windows = {Role.SEARCH: cut_windows(documents, text, places[:first])}
            places = places[first:]
            if places:
                windows[Role.VALIDATION] = cut_windows(documents, text, places)
        if needles is not None:
            windows = {role: plant(plain, needles) for role, plain in windows.items()}
        windows = {role: with_bos(plain, bos) for role, plain in windows.items()}
        if 0 < screened < len(windows[Role.SEARCH]):
            windows[Role.SCREEN] = windows[Role.SEARCH][:screened]
        return cls(windows, documents, places, text, needles, bos)

    def random(self, random: np.random.Generator) -> RandomWindows:
        """Return random windows that share no text with a validation window."""
        return RandomWindows(
            self.documents, self.length, self.held_out, random, self.needles, self.bos, self.shown
        )

    def first(self, length: int, needles: np.random.Generator | None = None) -> WindowsByRole:
        """Return the first `length` tokens of each window of plain text, with `needles` planted."""
        front = 0 if self.bos is None else 1
        windows = {role: whole[:, :length] for role, whole in self.windows.items()}
        if needles is not None:
            for role in (Role.SEARCH, Role.VALIDATION):
                if role in windows:
                    planted = plant(windows[role][:, front:], needles)
                    windows[role] = with_bos(planted, self.bos)
            if Role.SCREEN in windows:
                windows[Role.SCREEN] = windows[Role.SEARCH][: len(windows[Role.SCREEN])]
        return dataclasses.replace(self, windows=windows, needles=needles, shown=length - front)

    def digest(self) -> str:
        """Return a hash of the documents."""
        return digests(self.documents)


def draw_windows(
    documents: Sequence[torch.Tensor], length: int, count: int, random: np.random.Generator
) -> torch.Tensor:
    """Draw up to `count` windows of `length` tokens that do not overlap: int64 `[S, length]`.

    Each document gives one window, at a random place, and the documents come in random order. Then
    those that are long enough give a second one, and so on. So windows may share a document, but
    never a token.
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
    return torch.stack(
        [documents[index][start : start + length].to(torch.int64) for index, start in places]
    )


class RandomWindows:
    """Any number of windows at random places of the documents, outside the held-out windows.

    Documents come in random order, and in a new random order when each has given a window.

    Parameters
    ----------
    documents
        1-D token ids; at least one document has room for a window outside the held-out ones.
    length
        Tokens of a window, without its BOS.
    held_out
        Places `(document, start)` of windows of the same length, of which no token may appear.
    random
        Random numbers for the order and the places.
    needles
        Random numbers that plant needles; None: plain text.
    bos
        The token in front of every window; None: none.
    shown
        What is given of a window are its first `shown` tokens; None: all.
    """

    def __init__(
        self,
        documents: Sequence[torch.Tensor],
        length: int,
        held_out: Sequence[tuple[int, int]],
        random: np.random.Generator,
        needles: np.random.Generator | None = None,
        bos: int | None = None,
        shown: int | None = None,
    ):
        self.length = length
        self.shown = length if shown is None else shown
        self.needles = needles
        self.bos = bos
        self.random = random
        self._order: list[int] = []
        self._documents = []
        taken: dict[int, list[int]] = {}
        for where, start in held_out:
            taken.setdefault(where, []).append(start)
        for index, document in enumerate(documents):
            free = _free_starts(len(document), length, taken.get(index, []))
            if free[0]:
                self._documents.append((document, *free))

    def draw(self, count: int) -> torch.Tensor:
        """Return the next `count` windows: int64 `[count, length]`, one more with BOS."""
        windows = []
        for _ in range(count):
            if not self._order:
                self._order = [int(i) for i in self.random.permutation(len(self._documents))]
            document, firsts, counts = self._documents[self._order.pop()]
            pick = int(self.random.integers(counts[-1]))
            run = bisect.bisect_right(counts, pick)
            start = firsts[run] + pick - (counts[run - 1] if run else 0)
            windows.append(document[start : start + self.shown].to(torch.int64))
        drawn = torch.stack(windows)
        drawn = drawn if self.needles is None else plant(drawn, self.needles)
        return with_bos(drawn, self.bos)


class WindowPool:
    """Random windows of which the first `size` come again and again, in ever new random order.

    Parameters
    ----------
    windows
        Where the first `size` windows come from.
    size
        How many there are.
    random
        Random numbers for the order.
    """

    def __init__(self, windows: RandomWindows, size: int, random: np.random.Generator):
        self.windows, self.size, self.random = windows, size, random
        self._pool: list[torch.Tensor] = []
        self._order: list[int] = []

    def draw(self, count: int) -> torch.Tensor:
        """Return the next `count` windows: int64 `[count, length]`."""
        drawn = []
        for _ in range(count):
            if len(self._pool) < self.size:
                self._pool.append(self.windows.draw(1)[0])
                drawn.append(self._pool[-1])
                continue
            if not self._order:
                self._order = [int(i) for i in self.random.permutation(self.size)]
            drawn.append(self._pool[self._order.pop()])
        return torch.stack(drawn)


def _texts(
    documents: Iterable[Any], length: int, vocab_size: int | None, bos: int | None, name: str
) -> list[torch.Tensor]:
    """Return checked documents without `bos` in front; one at least fills a window behind its BOS.

    `length` counts BOS. A document in which BOS repeats may be too short without it.
    """
    checked = as_documents(documents, min_length=length, vocab_size=vocab_size, name=name)
    texts = without_bos(checked, bos)
    least, longest = length - (bos is not None), max(map(len, texts))
    if longest < least:
        raise ValueError(
            f"{name}: expected one of at least {least} tokens behind the BOS at its start, "
            f"got the longest {longest} tokens"
        )
    return texts


def _free_starts(size: int, length: int, taken: Iterable[int]) -> tuple[list[int], list[int]]:
    """Return where windows may start that share no token with those that start at `taken`.

    Runs of places, not each place: a document may be a file of billions of tokens. Of each run the
    first place, and how many places there are up to its end, those of earlier runs included.
    """
    firsts: list[int] = []
    counts: list[int] = []
    first = count = 0
    for start in [*sorted(taken), size]:
        end = min(start, size) - length + 1
        if first < end:
            count += end - first
            firsts.append(first)
            counts.append(count)
        first = max(first, start + length)
    return firsts, counts


def _disjoint_starts(size: int, length: int, random: np.random.Generator) -> list[int]:
    """Place as many windows as fit, the spare tokens spread at random, in random order."""
    fitting = size // length
    # Where the windows would start if each had length 0: sorted draws from the spare room.
    gaps = np.sort(random.integers(0, size - fitting * length, size=fitting, endpoint=True))
    starts = gaps + length * np.arange(fitting)
    return [int(start) for start in random.permutation(starts)]


def scored_tokens(windows: torch.Tensor, last_tokens: int | None) -> int:
    """Return how many tokens at the end of each window are scored: at most all but the first."""
    most = windows.shape[1] - 1
    return most if last_tokens is None else min(last_tokens, most)
