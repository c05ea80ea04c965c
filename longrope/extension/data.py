"""Rows of training text, each a function of the seed and its number alone.

Any row can be made without those before it, so a resumed run takes the text of an uninterrupted one
whatever the number of workers or devices, and documents are never copied: they may be memory maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

#: What `targets` hold where nothing is predicted; the `ignore_index` of `ops.linear_nll`.
NO_TARGET = -100


class Piece(NamedTuple):
    """Tokens `begin` to `end` of a document, on their own in a row.

    `opens` and `closes` say whether BOS is put in front of them and EOS behind.
    """

    document: int
    begin: int
    end: int
    opens: bool
    closes: bool


class TrainingRows(torch.utils.data.Dataset):
    """`count` rows of `length` tokens.

    A row is a dict: `input_ids` and `position_ids`, int64 `[length]`, and `targets`, what each
    token predicts (`NO_TARGET` where a piece of text ends).

    Parameters
    ----------
    documents
        1-D token ids without BOS; at least one holds a row.
    length
        Tokens of a row, BOS included.
    count
        How many rows there are.
    seed
        Row `i` depends on `(seed, first + i)` alone.
    packed
        Rows hold whole documents one after another, in random order; those that do not fit go on
        in the next row. Else a row is one window, drawn uniformly over all places.
    short_share, short_length
        The share of rows that hold windows of `short_length` tokens instead.
    bos, eos
        The token in front of every window and document, and behind the end of every whole
        document that does not end with it; None: none.
    first
        The number of the first row, where earlier stages have had those before it.
    """

    def __init__(
        self,
        documents: Sequence[torch.Tensor],
        length: int,
        count: int,
        seed: int,
        *,
        packed: bool = False,
        short_share: float = 0.0,
        short_length: int | None = None,
        bos: int | None = None,
        eos: int | None = None,
        first: int = 0,
    ):
        self.documents = documents
        self.length, self.count, self.seed = length, count, seed
        self.packed, self.short_share = packed, short_share
        self.short_length = short_length or length
        self.bos, self.eos, self.first = bos, eos, first
        self._places: dict[int, np.ndarray] = {}
        before = int(bos is not None)
        self._sizes = np.array([before + len(d) + _lacks(d, eos) for d in documents])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:  # what ends a loop over rows
            raise IndexError(f"row: expected 0 to {self.count - 1}, got {index}")
        ids, positions, targets = [], [], []
        for piece in self.pieces(index):
            tokens = self._tokens(piece)
            ids.append(tokens)
            positions.append(torch.arange(len(tokens)))
            targets += [tokens[1:], torch.tensor([NO_TARGET])]
        return {
            "input_ids": torch.cat(ids),
            "position_ids": torch.cat(positions),
            "targets": torch.cat(targets),
        }

    def pieces(self, index: int) -> list[Piece]:
        """Return what a row is made of."""
        index += self.first
        random = np.random.default_rng([self.seed, 0, index])
        if random.random() < self.short_share:
            left, pieces = self.length, []
            while left:
                size = min(self.short_length, left)
                pieces.append(self._window(size, random))
                left -= size
            return pieces
        if self.packed:
            return list(self._packed(index * self.length))
        return [self._window(self.length, random)]

    def names(self, index: int) -> str:
        """Say what a row is made of, for messages."""
        parts = [f"document {p.document} from token {p.begin}" for p in self.pieces(index)]
        return ", ".join(parts[:3]) + (" and others" if len(parts) > 3 else "")

    def _window(self, size: int, random: np.random.Generator) -> Piece:
        """Draw a window of `size` tokens, BOS included, uniformly over all places."""
        text = max(size - (self.bos is not None), 0)
        if text not in self._places:
            lengths = np.array([len(document) for document in self.documents])
            self._places[text] = np.cumsum(np.maximum(lengths - text + 1, 0))
        ends = self._places[text]
        pick = int(random.integers(ends[-1]))
        which = int(np.searchsorted(ends, pick, side="right"))
        begin = pick - (int(ends[which - 1]) if which else 0)
        return Piece(which, begin, begin + text, self.bos is not None, False)

    def _packed(self, start: int) -> Iterator[Piece]:
        """Yield the pieces of the row that begins at token `start` of the endless stream."""
        total = int(self._sizes.sum())
        left = self.length
        before = int(self.bos is not None)
        epoch, offset = divmod(start, total)
        for number in itertools.count(epoch):
            order = np.random.default_rng([self.seed, 1, number]).permutation(len(self.documents))
            for which in order:
                size = int(self._sizes[which])
                if offset >= size:
                    offset -= size
                    continue
                taken = min(size - offset, left)
                text = len(self.documents[which])
                begin, end = offset - before, offset + taken - before
                opens, closes = bool(before) and begin < 0, end > text
                yield Piece(int(which), max(begin, 0), min(end, text), opens, closes)
                left, offset = left - taken, 0
                if not left:
                    return

    def _tokens(self, piece: Piece) -> torch.Tensor:
        tokens = self.documents[piece.document][piece.begin : piece.end].to(torch.int64)
        before = [self.bos] if piece.opens else []
        after = [self.eos] if piece.closes else []
        if not before and not after:
            return tokens
        return torch.cat([torch.tensor(before, dtype=torch.int64), tokens,
                          torch.tensor(after, dtype=torch.int64)])  # fmt: skip


def _lacks(document: torch.Tensor, eos: int | None) -> bool:
    """Say whether EOS is put behind a document; a tokenizer may have done it."""
    return eos is not None and not (len(document) and int(document[-1]) == eos)


def check_enough(documents: Sequence[torch.Tensor], length: int, packed: bool, name: str) -> None:
    """Refuse documents of which no row of `length` tokens can be made; `name` is the stage's."""
    longest = max(map(len, documents), default=0)
    total = sum(map(len, documents))
    if (total if packed else longest) < length:
        what = f"{total} tokens altogether" if packed else f"the longest {longest} tokens"
        raise ValueError(
            f"documents: expected {'' if packed else 'one of '}at least {length} tokens for stage "
            f"{name}, got {len(documents)} documents, {what}"
        )


def eos_token(eos: str | bool | int, model: Any, vocabulary: int | None) -> int | None:
    """Return the token behind the end of a document; None: none.

    `"auto"`: the config's `eos_token_id`, unless the model is one of bytes (a vocabulary of 256).
    """
    if eos is False:
        return None
    token: Any = eos
    if eos == "auto" or eos is True:
        token = getattr(model.config.get_text_config(), "eos_token_id", None)
        token = token[0] if isinstance(token, (list, tuple)) and token else token
        if not isinstance(token, int) or (eos == "auto" and vocabulary == 256):
            token = None
    outside = token is not None and vocabulary is not None and token >= vocabulary
    if eos == "auto":
        return None if outside else token
    if token is None or outside:
        raise ValueError(
            f"eos: expected a token of the model's vocabulary of {vocabulary}, got {token}"
        )
    return token
