"""Token ids in files of numbers: `.npy`, and `.bin` without a header."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longrope.documents.streams import NotTextError

#: The types that a `.bin` file may be said to hold.
TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
#: First numbers of files that hold a header before their tokens (llm.c), as little-endian int32.
_HEADERS = {20240520: "GPT-2", 20240801: "Llama 3"}


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


def read_npy(path: Path) -> Iterator[np.ndarray]:
    """Yield the documents of a `.npy` file, mapped into memory: one, or one a row."""
    try:
        tokens = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected a .npy file of numbers, got {error}") from None
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        raise ValueError(
            f"{path}: expected token ids in 1 or 2 dimensions, "
            f"got {tokens.dtype} {list(tokens.shape)}"
        )
    yield from tokens[None].view(np.ndarray) if tokens.ndim == 1 else tokens.view(np.ndarray)
