"""Token ids in files of numbers: `.npy`, and `.bin` without a header."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from longrope.documents.streams import NotTextError

#: The types that a `.bin` file may be said to hold.
TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
#: First numbers of files that hold a header before their tokens (llm.c), as little-endian int32.
_HEADERS = {20240520: "GPT-2", 20240801: "Llama 3"}

#: Characters of a reason that an error repeats: some hold the whole header.
_REASON = 200


def token_dtype(name: str | None) -> np.dtype | None:
    """Return the type that `name` says the tokens of a `.bin` file have, little-endian."""
    if name is None:
        return None
    known = getattr(name, "__name__", None) or str(name)  # numpy.uint16 too
    if known not in TOKEN_DTYPES:
        listed = ", ".join(map(repr, TOKEN_DTYPES))
        raise ValueError(f"token_dtype: expected one of {listed}, got {name!r}")
    return np.dtype(known).newbyteorder("<")


def read_bin(path: Path, dtype: np.dtype | None) -> Iterator[np.ndarray]:
    """Yield the tokens of a `.bin` file as one document, mapped into memory."""
    if dtype is None:
        raise NotTextError(
            f"{path}: expected the type of its tokens (token_dtype, such as 'uint16'), got none"
        )
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(
            f"{path}: expected a whole number of {dtype.name} tokens, got {size} bytes"
        )
    if not size:
        yield np.zeros(0, dtype)
        return
    if size >= 4 and int(np.fromfile(path, "<i4", 1)[0]) in _HEADERS:
        raise ValueError(
            f"{path}: expected tokens alone, got a file with a header of llm.c; "
            "save its tokens as .npy"
        )
    # Copy-on-write: torch warns about arrays that it may not write.
    yield np.memmap(path, dtype, mode="c").view(np.ndarray)


def mapped_npy(path: Path) -> np.ndarray:
    """Return the ids of a `.npy` file, in 1 or 2 dimensions, mapped into memory.

    Raises `ValueError` for anything else. Not by `np.load`, which goes by the content and opens
    archives (`.npz`) too; and its header is checked first, because `np.memmap` divides by the size
    of a number and multiplies out the shape without a look.
    """
    try:
        with path.open("rb") as file:
            shape, fortran_order, dtype = _npy_header(file)
            offset, size = file.tell(), file.seek(0, os.SEEK_END)
        if dtype.kind in "iu" and len(shape) in (1, 2):
            needed = offset + dtype.itemsize * math.prod(shape)
            if min(shape) < 0 or needed > size:
                raise ValueError(f"one of {size} bytes with the shape {list(shape)}")
            order = "F" if fortran_order else "C"
            # Copy-on-write: torch warns about arrays that it may not write.
            return np.memmap(path, dtype, "c", offset, shape, order).view(np.ndarray)
    except Exception as error:  # the header is parsed as Python: a damaged one raises anything
        reason = " ".join(str(error).split())[:_REASON] or type(error).__name__
        raise ValueError(f"{path}: expected a .npy file of numbers, got {reason}") from None
    got = f"{dtype} {list(shape)}"[:_REASON]
    raise ValueError(f"{path}: expected token ids in 1 or 2 dimensions, got {got}")


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"one of the unknown version {version}")
    first = version == (1, 0)  # the third differs from the second in names of fields alone
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("Python objects")
    return shape, fortran_order, dtype


def read_npy(path: Path) -> Iterator[np.ndarray]:
    """Yield the documents of a `.npy` file, mapped into memory: one, or one a row."""
    tokens = mapped_npy(path)
    if tokens.ndim == 1:
        yield tokens
    elif tokens.size:  # a header alone may claim any number of empty rows
        yield from tokens
