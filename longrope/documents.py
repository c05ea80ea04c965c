"""Documents: 1-D sequences of token ids, and how to read them from files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Bytes of a file that are looked at to tell text from binary data (a NUL byte: the rule of git).
_SNIFFED_BYTES = 8000


def load_data(
    path: str | Path,
    tokenizer: Any = None,
    *,
    text_field: str = "text",
    min_length: int = 1,
) -> list[np.ndarray]:
    """Read documents of token ids from a file or a folder.

    A text file is one document; a folder is one document per text file, in the order of their
    paths, sub-folders included (hidden and binary files are left out, `.jsonl` and `.parquet`
    files are read as such); a `.jsonl` or `.parquet` file is one document per line or row.

    Parameters
    ----------
    path
        Text file, folder, `.jsonl` or `.parquet` file.
    tokenizer
        None: a document's tokens are its UTF-8 bytes, 0 to 255. Otherwise a Hugging Face
        tokenizer (called without special tokens) or any function from `str` to token ids.
    text_field
        Where a JSON object or a Parquet row keeps its text. A line that is a JSON string is the
        text itself, and a list of integers (or an `input_ids` field) is taken as token ids.
    min_length
        Shorter documents are left out; empty ones always are.

    Returns
    -------
    list of numpy arrays
        Each 1-D, int64.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ImportError
        If a `.parquet` file is read without pyarrow.
    ValueError
        If a line or file cannot be read as text, or no document is long enough.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: there is no file or folder {str(path)!r}")
    encode = _encoder(tokenizer)
    if path.is_dir():
        texts = (text for file in _files(path) for text in _read(file, text_field))
    else:
        texts = _read(path, text_field)
    documents = [_tokens(text, encode) for text in texts]
    return long_enough(documents, max(min_length, 1), f"path: {str(path)!r}")


def long_enough(documents: Sequence[np.ndarray], least: int, where: str) -> list[np.ndarray]:
    """Return the documents of at least `least` tokens; `ValueError` where there is none."""
    kept = [document for document in documents if len(document) >= least]
    if not kept:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"{where} holds no document of at least {least} tokens "
            f"({len(documents)} documents, the longest {longest} tokens)"
        )
    return kept


def as_documents(
    documents: Iterable[Any],
    *,
    min_length: int = 2,
    vocab_size: int | None = None,
    name: str = "documents",
) -> list[torch.Tensor]:
    """Check documents and return them as int64 CPU tensors of one dimension.

    Raises `ValueError` with one sentence for an empty list, something that is not a sequence of
    integers, a document shorter than `min_length`, or a token id outside the vocabulary.
    """
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Iterable):
        raise ValueError(
            f"{name}: expected a list of documents of token ids, got {type(documents).__name__}"
        )
    result = []
    for index, document in enumerate(documents):
        where = f"{name}[{index}]"
        if isinstance(document, (str, bytes)):
            raise ValueError(f"{where}: expected token ids, got text (see longrope.load_data)")
        try:
            tokens = torch.as_tensor(document)
        except (TypeError, ValueError, RuntimeError):
            kind = type(document).__name__
            raise ValueError(f"{where}: expected 1-D integer token ids, got {kind}") from None
        integer = not (tokens.is_floating_point() or tokens.is_complex())
        integer = integer and tokens.dtype != torch.bool
        if tokens.ndim != 1 or (tokens.numel() and not integer):
            kind = str(tokens.dtype).removeprefix("torch.")
            raise ValueError(
                f"{where}: expected 1-D integer token ids, got {kind} {list(tokens.shape)}"
            )
        if len(tokens) < min_length:
            raise ValueError(
                f"{where}: expected at least {min_length} tokens, got {len(tokens)}; "
                "leave out shorter documents"
            )
        tokens = tokens.to("cpu", torch.int64)
        if vocab_size is not None and len(tokens):
            low, high = (int(v) for v in tokens.aminmax())
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"{where}: token id {low if low < 0 else high} is outside the model's "
                    f"vocabulary of {vocab_size}"
                )
        result.append(tokens)
    if not result:
        raise ValueError(f"{name}: expected at least one document, got none")
    return result


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            if path.suffix.lower() not in _READERS:
                with path.open("rb") as file:
                    if b"\0" in file.read(_SNIFFED_BYTES):
                        continue
            yield path


def _read(path: Path, text_field: str) -> Iterator[Any]:
    return _READERS.get(path.suffix.lower(), _read_text)(path, text_field)


def _read_text(path: Path, text_field: str) -> Iterator[bytes]:
    yield path.read_bytes()


def _read_jsonl(path: Path, text_field: str) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError:
                raise ValueError(f"{path}:{number}: expected one JSON value a line") from None
            yield _text_of(entry, text_field, f"{path}:{number}")


def _read_parquet(path: Path, text_field: str) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "path: reading .parquet files needs pyarrow (pip install pyarrow)"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"path: {str(path)!r} is not a Parquet file ({error})") from None
    with file:
        fields = [f for f in ("input_ids", text_field) if f in file.schema_arrow.names][:1]
        if not fields:
            raise ValueError(
                f"{path}: expected a column {text_field!r}, got {file.schema_arrow.names}"
            )
        row = 0
        for batch in file.iter_batches(columns=fields):
            for entry in batch.to_pylist():
                yield _text_of(entry, text_field, f"{path}: row {row}")
                row += 1


_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _text_of(entry: Any, text_field: str, where: str) -> str | list[int]:
    """Return the text or the token ids that one JSON value or Parquet row holds."""
    value = entry
    if isinstance(entry, dict):
        value = entry.get("input_ids", entry.get(text_field))
    if isinstance(value, list) and all(type(v) is int and -(2**63) <= v < 2**63 for v in value):
        return value
    if isinstance(value, str):
        return value
    raise ValueError(
        f"{where}: expected text, a list of token ids, or an object with a field {text_field!r}"
    )


def _tokens(text: str | bytes | list[int], encode: Callable | None) -> np.ndarray:
    if isinstance(text, list):
        return np.asarray(text, np.int64)
    if encode is None:
        # A lone half of a surrogate pair, which JSON can spell, has no bytes.
        data = text if isinstance(text, bytes) else text.encode(errors="replace")
        return np.frombuffer(data, np.uint8).astype(np.int64)
    # A stray byte that is not UTF-8 must not end a long run over many files.
    return encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _encoder(tokenizer: Any) -> Callable[[str], np.ndarray] | None:
    if tokenizer is None:
        return None
    if not callable(tokenizer):
        kind = type(tokenizer).__name__
        raise ValueError(f"tokenizer: expected a tokenizer or a function, got {kind}")
    if hasattr(tokenizer, "convert_ids_to_tokens"):  # a Hugging Face tokenizer

        def encode(text: str) -> Sequence[int]:
            # verbose=False: no warning about texts longer than the model's window, the point here.
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    else:
        encode = tokenizer

    def checked(text: str) -> np.ndarray:
        ids = np.asarray(encode(text))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                f"tokenizer: expected a list of token ids, got {ids.dtype} {list(ids.shape)}"
            )
        return ids.astype(np.int64)

    return checked
