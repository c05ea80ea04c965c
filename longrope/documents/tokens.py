"""From text to token ids, in pieces: what is alive at once does not grow with the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from longrope.documents.streams import BLOCK

#: Characters of a piece that a fast tokenizer gets, and how many it shares with the one before.
#: A token costs the tokenizer some 300 bytes while it works, its id alone 2 or 4.
PIECE, SHARED = 1 << 16, 1 << 11
#: Tokens on each side of a joint on which the two pieces must agree.
_AGREED = 8
_SURROGATES = re.compile("[\ud800-\udfff]")


class Encoder:
    """Turns texts into token ids of the smallest unsigned type that holds the vocabulary.

    Parameters
    ----------
    tokenizer
        None: the tokens are the text's UTF-8 bytes. A Hugging Face tokenizer, or a function from
        `str` to token ids.

    Attributes
    ----------
    bos
        The id of the one token that the tokenizer puts in front of every text; None where it does
        not, or this is a function, of which it is not known.
    knows_bos
        Whether that is known: not for a function.

    Raises
    ------
    ValueError
        Where the tokenizer is none, or returns something else than ids.
    """

    def __init__(self, tokenizer: Any):
        if tokenizer is not None and not callable(tokenizer):
            kind = type(tokenizer).__name__
            raise ValueError(f"tokenizer: expected a tokenizer or a function, got {kind}")
        self.tokenizer = tokenizer
        self._before: list[int] = []
        self._after: list[int] = []
        self._encode: Callable[[str], Any] = tokenizer
        hugging_face = hasattr(tokenizer, "convert_ids_to_tokens")
        self.knows_bos = tokenizer is None or hugging_face
        if hugging_face:
            self._encode = self._without_special
            self._before, self._after = self._added()
        self.bos = self._before[0] if len(self._before) == 1 else None

    def __call__(self, text: str | Iterable[str]) -> np.ndarray:
        """Return the token ids of a text, or of the pieces of one: unsigned, 1-D.

        What the tokenizer adds to a text (BOS, EOS) is there once, also where the text has it.
        """
        whole = isinstance(text, str)
        if self.tokenizer is None:
            # A lone half of a surrogate pair, which JSON can spell, has no bytes. The stray bytes
            # of a file stay what they are.
            errors = "replace" if whole else "surrogateescape"
            data = bytearray()
            for piece in _cut(text, BLOCK) if whole else text:
                data += piece.encode(errors=errors)
            return np.frombuffer(data, np.uint8)
        pieces = _cut(text, BLOCK) if whole else text
        pieces = (_without_lone_surrogates(piece) for piece in pieces)
        if getattr(self.tokenizer, "is_fast", False) is True:
            parts = [compact(part) for part in self._in_pieces(pieces)]
        else:
            parts = [compact(_checked(self._encode("".join(pieces))))]
        return self._completed(np.concatenate(parts) if len(parts) != 1 else parts[0])

    def state(self) -> str | None:
        """Return all that the ids of a text depend on, as text; None where that is not known."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if getattr(self.tokenizer, "is_fast", False) is not True or not hasattr(backend, "to_str"):
            return None
        # What the tokenizer says at every call is not part of its backend's own state.
        split = getattr(self.tokenizer, "split_special_tokens", False)
        return f"{backend.to_str()} {self._before} {self._after} {split}"

    def bare(self, text: str) -> np.ndarray:
        """Return the token ids of a short text alone, without BOS and EOS: int64, 1-D.

        What a function adds to a text is not known, and stays.
        """
        return (
            self(text).astype(np.int64) if self.tokenizer is None else _checked(self._encode(text))
        )

    def _completed(self, ids: np.ndarray) -> np.ndarray:
        before, after = self._before, self._after
        if not len(ids) or ids[: len(before)].tolist() == before:
            before = []
        if not len(ids) or ids[len(ids) - len(after) :].tolist() == after:
            after = []
        if not before and not after:
            return ids
        added = [compact(np.asarray(part, np.int64)) for part in (before, after)]
        return np.concatenate([added[0], ids, added[1]])

    def _without_special(self, text: str) -> Sequence[int]:
        # verbose=False: no warning about texts longer than the model's window, the point here.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _added(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer puts before and after a text."""
        names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
        if all(getattr(self.tokenizer, name, None) is None for name in names):
            return [], []
        plain = list(self._without_special("a"))
        full = list(self.tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def _in_pieces(self, pieces: Iterator[str]) -> Iterator[np.ndarray]:
        """Yield the ids of a text as a fast tokenizer would return them for the whole.

        The text is cut into pieces that overlap, and two neighbours are joined where they agree on
        a run of tokens and their places, away from the ends of both: a tokenizer looks at a few
        words around a token. Where they agree nowhere, the text goes on as one larger piece.
        """
        text, size = _filled("", pieces, PIECE + 1), PIECE
        if len(text) <= size:
            yield _checked(self._encode(text))
            return
        left = self._with_places(text[:size])
        start = 0  # the first of its tokens that is not yielded yet
        while True:
            text = _filled(text, pieces, size + PIECE)
            if len(text) <= size:
                yield left[0][start:]
                return
            shift = size - SHARED
            right = self._with_places(text[shift : shift + PIECE])
            joint = _joint(left, right, shift, size)
            if joint is None:
                size *= 2
                text = _filled(text, pieces, size)
                left = self._with_places(text[:size])
                continue
            yield left[0][start : joint[0]]
            text, left, start, size = text[shift:], right, joint[1], PIECE

    def _with_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        found = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        places = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)
        return _checked(found["input_ids"]), places


def compact(ids: np.ndarray) -> np.ndarray:
    """Return ids in the smallest of uint8, uint16 and uint32 that holds them; else int64."""
    if not ids.size:
        return ids.astype(np.uint8)
    low, high = int(ids.min()), int(ids.max())
    for kind in (np.uint8, np.uint16, np.uint32):
        if low >= 0 and high <= np.iinfo(kind).max:
            return ids.astype(kind, copy=False)
    return ids.astype(np.int64, copy=False)


def _checked(ids: Any) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"tokenizer: expected a list of token ids, got {ids.dtype} {list(ids.shape)}"
        )
    return ids.astype(np.int64, copy=False)


def _cut(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, max(len(text), 1), size))


def _filled(text: str, pieces: Iterator[str], size: int) -> str:
    """Return `text` with pieces added until it has `size` characters, or they end."""
    while len(text) < size:
        more = next(pieces, None)
        if more is None:
            break
        text += more
    return text


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text)
    return text


def _joint(
    left: tuple[np.ndarray, np.ndarray],
    right: tuple[np.ndarray, np.ndarray],
    shift: int,
    size: int,
) -> tuple[int, int] | None:
    """Return where two pieces meet: the end of the left one's tokens, the first of the right one's.

    `left` and `right` are the ids and the places of the tokens; the right piece begins `shift`
    characters after the left one, which ends at `size`. None: they agree nowhere.
    """
    first = int(np.searchsorted(left[1][:, 0], shift))
    tail = _rows(left[0][first:], left[1][first:])
    last = int(np.searchsorted(right[1][:, 1], size - shift, side="right"))
    head = _rows(right[0][:last], right[1][:last] + shift)
    where = {row: index for index, row in enumerate(head)}
    # From the middle outwards: there both pieces have the most text on either side.
    order = sorted(range(_AGREED, len(tail) - _AGREED), key=lambda i: abs(2 * i - len(tail)))
    for i in order:
        j = where.get(tail[i])
        if j is not None and j >= _AGREED:
            run = head[j - _AGREED : j + _AGREED]
            if len(run) == 2 * _AGREED and tail[i - _AGREED : i + _AGREED] == run:
                return first + i, j
    return None


def _rows(ids: np.ndarray, places: np.ndarray) -> list[tuple[int, int, int]]:
    return list(zip(ids.tolist(), *places.T.tolist(), strict=True))
