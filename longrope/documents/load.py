"""`longrope.load_data`: from files to documents of token ids."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.documents.cache import TokenCache
from longrope.documents.checks import Documents, long_enough
from longrope.documents.notes import Notes
from longrope.documents.paths import files_of
from longrope.documents.readers import Reading, read
from longrope.documents.streams import NotTextError
from longrope.documents.token_files import token_dtype as checked_dtype
from longrope.documents.tokens import Encoder

Paths = str | os.PathLike | Sequence[str | os.PathLike]


def load_data(
    path: Paths,
    tokenizer: Any = None,
    *,
    text_field: str = "text",
    min_length: int = 1,
    token_dtype: str | None = None,
    cache: str | os.PathLike | None = None,
) -> Documents | list[np.ndarray]:
    """Read documents of token ids from files and folders.

    A text file is one document. A `.jsonl`, `.ndjson`, `.json`, `.parquet` or `.arrow` file is one
    document per line, element or row; `.npy` and `.bin` files hold token ids. All but these
    two may be compressed (gzip, bzip2, xz, zstd). A folder is all of these in the order of their
    paths, sub-folders and links included; also one that `datasets` has written, or the hub's cache.
    What is left out is counted and named in one warning. See docs/data.md for the formats.

    Parameters
    ----------
    path
        File or folder, or several of them.
    tokenizer
        None: a document's tokens are its UTF-8 bytes, 0 to 255. Otherwise a Hugging Face
        tokenizer, or any function from `str` to token ids. What a tokenizer adds to a text (BOS,
        EOS) is in each document once.
    text_field
        Where a JSON object or a row keeps its text, or its token ids. A line that is a JSON string
        is the text itself, and a list of integers (or a field `input_ids`, unless another one is
        named here) is taken as token ids.
    min_length
        Shorter documents are left out; empty ones always are.
    token_dtype
        The type of the tokens in `.bin` files, which do not say it: `"uint16"` or `"uint32"`, say.
    cache
        A folder that keeps the token ids of text files, by content and tokenizer: the next call
        reads them from there, all documents of a file in the largest of their types. Not inside a
        folder that is read. For fast tokenizers; None: nothing is kept.

    Returns
    -------
    list of numpy arrays
        Each 1-D, of the smallest unsigned type that holds its ids: uint8, uint16 or uint32 (cast
        before arithmetic). Ids from `.npy` and `.bin` files keep their type, and stay in the file
        until they are used. Where the tokens are those of the text alone, the list has `bos` (see
        `longrope.documents.Documents`).

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ImportError
        If a file is read for which a package is missing.
    ValueError
        If a file cannot be read as what it is, or is no text, or no document is long enough.
    """
    documents, notes = read_documents(
        path, tokenizer, text_field=text_field, min_length=min_length, token_dtype=token_dtype,
        cache=cache,
    )  # fmt: skip
    if notes:
        warnings.warn(f"load_data: {notes}", stacklevel=2)
    return documents


def read_documents(
    path: Paths,
    tokenizer: Any = None,
    *,
    text_field: str = "text",
    min_length: int = 1,
    token_dtype: str | None = None,
    cache: str | os.PathLike | None = None,
) -> tuple[Documents | list[np.ndarray], str]:
    """As `load_data`; returns the documents, and what was left out as one line or as `""`."""
    single = isinstance(path, (str, os.PathLike))
    paths = [Path(one) for one in ([path] if single else path)]
    if not paths:
        raise ValueError("path: expected a file or folder, got none")
    for one in paths:
        if not one.exists():
            raise FileNotFoundError(f"path: there is no file or folder {str(one)!r}")
        if not (one.is_file() or one.is_dir() or one.is_fifo()):
            raise ValueError(
                f"path: expected a file, folder or pipe, got {str(one)!r}, a socket or device"
            )
    notes = Notes()
    reading = Reading(text_field, checked_dtype(token_dtype), notes)
    encode = Encoder(tokenizer)
    kept_tokens = None
    if cache is not None:
        _check_outside(Path(cache), paths)
        kept_tokens = TokenCache(cache, encode, text_field)
    documents: list[np.ndarray] = []
    ready_made = False  # ids that were in a file
    for one in paths:
        folder = one.is_dir()
        for file in files_of(one, notes) if folder else [one]:
            try:
                found, from_text = _of_file(file, reading, encode, kept_tokens)
                documents += found
                ready_made |= not from_text
            except NotTextError as error:
                if not folder:
                    raise ValueError(f"path: {error}") from None
                notes.add("files that are not text", file.name)
    empty = sum(not len(document) for document in documents)
    if empty:
        notes.add("empty documents", count=empty)
    least = max(min_length, 1)
    where = ", ".join(repr(str(one)) for one in paths)
    kept = long_enough(documents, least, f"path: {where}")
    if len(documents) - empty > len(kept):
        short = len(documents) - empty - len(kept)
        notes.add(f"documents that are shorter than {least} tokens", count=short)
    if encode.knows_bos and not ready_made:
        kept = Documents(kept, encode.bos)
    return kept, notes.line()


def _check_outside(cache: Path, paths: Sequence[Path]) -> None:
    """Refuse a cache whose files would be read as documents the next time."""
    for one in paths:
        if one.is_dir() and cache.resolve().is_relative_to(one.resolve()):
            inside = cache.resolve().relative_to(one.resolve()).parts
            if not any(part.startswith(".") for part in inside):  # hidden ones are not read
                raise ValueError(
                    f"cache: expected a folder outside {str(one)!r}, whose files are documents, "
                    f"got {str(cache)!r}"
                )


def _of_file(
    file: Path, reading: Reading, encode: Encoder, cache: TokenCache | None
) -> tuple[list[np.ndarray], bool]:
    """Return the documents of a file, and whether all of them are tokens of text."""
    entry = None if cache is None else cache.entry(file)
    found = None if entry is None else cache.get(entry)
    if found is not None:
        return found, True
    documents, from_text = [], True
    noted = reading.notes.line()
    for raw in read(file, reading):
        ids = isinstance(raw, np.ndarray)
        from_text &= not ids
        documents.append(raw if ids else encode(raw))
    # What was left out of a file is said every time: such a file is read every time.
    if entry is not None and from_text and reading.notes.line() == noted:
        cache.put(entry, documents)
    return documents, from_text
