"""The formats of text: whole files, JSON and JSON Lines."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope.documents import tables, token_files
from longrope.documents.notes import Notes
from longrope.documents.streams import (
    COMPRESSED_SUFFIXES,
    NotTextError,
    marked_encoding,
    opened,
    pieces_of_text,
)
from longrope.documents.tokens import compact


@dataclass
class Reading:
    """How files are read, and what was left out of them."""

    text_field: str
    token_dtype: np.dtype | None
    notes: Notes

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that may hold a document, the first that is there counts.

        Ids that were made before win over text, unless the caller named the field.
        """
        if self.text_field == "text":
            return "input_ids", "text"
        return self.text_field, "input_ids"


#: A document as a file holds it: text, the pieces of a text, or token ids.
Raw = str | Iterable[str] | np.ndarray


def read(path: Path, reading: Reading) -> Iterator[Raw]:
    """Yield the documents of a file, by its ending and its content.

    Raises `NotTextError` where it holds no documents, and `ValueError` where it is damaged.
    """
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    kind = Path(name).suffix
    if kind == ".npy":
        yield from token_files.read_npy(path)
        return
    if kind == ".bin":
        yield from token_files.read_bin(path, reading.token_dtype)
        return
    if kind not in _VALUES:
        yield _text(path)
        return
    with opened(path) as stream:
        values = _VALUES[kind](path, stream, reading.fields)
        for value, where in values:
            document = document_of(value, where, reading)
            if document is not None:
                yield document


def document_of(value: Any, where: str, reading: Reading) -> str | np.ndarray | None:
    """Return the text or the token ids of one JSON value or row; None for null, which is counted.

    Raises `ValueError` where it is neither.
    """
    if isinstance(value, dict):
        found = [value[field] for field in reading.fields if field in value]
        value = next((v for v in found if v is not None), None if found else ...)
    if value is None:
        reading.notes.add("null rows", where)
        return None
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim == 1:
        return compact(value)
    if isinstance(value, list) and all(type(v) is int and -(2**63) <= v < 2**63 for v in value):
        return compact(np.asarray(value, np.int64))
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{where}: expected text, got bytes that are no UTF-8") from None
    if isinstance(value, str):
        return value
    raise ValueError(
        f"{where}: expected text, a list of token ids, or an object with a field "
        f"{reading.text_field!r}"
    )


def _text(path: Path) -> Iterator[str]:
    with opened(path) as stream:
        yield from pieces_of_text(stream, str(path))


def _read_lines(
    path: Path, stream: io.BufferedReader, fields: Sequence[str]
) -> Iterator[tuple[Any, str]]:
    with _decoded(stream) as lines:
        yield from _lines(lines, str(path))


def _lines(lines: Iterable[bytes | str], where: str, first: int = 1) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        place = f"{where}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{place}: expected one JSON value a line") from None
        del line  # it may be hundreds of megabytes, like the text that was read from it
        yield value, place


@contextlib.contextmanager
def _decoded(stream: io.BufferedReader) -> Iterator[Iterable[bytes | str]]:
    """Give the lines of a stream; bytes of UTF-8, or text where a mark says what it is."""
    encoding = marked_encoding(stream)
    if encoding is None:
        yield stream
        return
    text = io.TextIOWrapper(stream, encoding, newline="\n")
    try:
        yield text
    finally:
        text.detach()  # the stream is closed by whoever opened it


def _read_json(
    path: Path, stream: io.BufferedReader, fields: Sequence[str]
) -> Iterator[tuple[Any, str]]:
    """Yield the documents of a `.json` file: a list, one object, or lines of objects.

    Much of what is called `.json` (C4, RedPajama) is JSON Lines.
    """
    with _decoded(stream) as lines:
        yield from _json_of(enumerate(lines, 1), str(path), fields)


def _json_of(
    lines: Iterator[tuple[int, bytes | str]], where: str, fields: Sequence[str]
) -> Iterator[tuple[Any, str]]:
    try:
        number, first = next(((n, line) for n, line in lines if line.strip()), (1, b""))
        text = _as_text(first)
        if not text.lstrip().startswith(("[", "{")):
            raise NotTextError(f"{where}: expected a JSON list, object or lines, got neither")
        value = None
        if text.lstrip().startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(text)
        if value is None:
            text += "".join(_as_text(line) for _, line in lines)
    except UnicodeDecodeError:
        raise NotTextError(f"{where}: expected JSON, got binary data") from None
    if value is None:
        yield from _elements(text.strip(), where, fields)
        return
    _expect_field(value, where, fields)
    yield value, f"{where}:{number}"
    yield from _lines((line for _, line in lines), where, number + 1)


def _as_text(line: bytes | str) -> str:
    return line if isinstance(line, str) else line.decode()


def _expect_field(value: dict, where: str, fields: Sequence[str]) -> None:
    if not any(field in value for field in fields):
        found = ", ".join(map(repr, list(value)[:5])) or "nothing"
        raise NotTextError(
            f"{where}: expected a list of documents, or objects with a field "
            f"{' or '.join(map(repr, fields))}, got an object with {found}"
        )


def _elements(text: str, where: str, fields: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """Yield the elements of a JSON list one by one, or a JSON object, from its text."""
    decoder = json.JSONDecoder()
    try:
        if not text.startswith("["):
            value = decoder.decode(text)
            _expect_field(value, where, fields)
            yield value, where
            return
        at, number, separator = _past_space(text, 1), 0, ","
        if text.startswith("]", at):
            at, separator = at + 1, "]"
        while separator == ",":
            value, at = decoder.raw_decode(text, at)
            if type(value) is int:  # a list of ids, which is one document
                yield decoder.decode(text), where
                return
            yield value, f"{where}: element {number}"
            number, at = number + 1, _past_space(text, at)
            separator, at = text[at : at + 1], _past_space(text, at + 1)
        if separator != "]" or at < len(text):
            raise ValueError(f"something else than a list at character {at}")
    except NotTextError:
        raise
    except RecursionError:
        raise ValueError(f"{where}: expected JSON, got one that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON, got a file broken at {error}") from None


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


#: Yields `(value, where)` for every row, line or element; by the ending of the file's name.
_VALUES: dict[str, Callable[..., Iterator[tuple[Any, str]]]] = {
    ".parquet": tables.read_parquet,
    ".arrow": tables.read_arrow,
    ".feather": tables.read_arrow,
    ".ipc": tables.read_arrow,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
}
