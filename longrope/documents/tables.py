"""Documents in columns: Parquet and Arrow files, row by row."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

#: Rows that are decoded at a time: documents can be books.
_ROWS = 64


def read_parquet(
    path: Path, stream: io.BufferedReader, fields: Sequence[str]
) -> Iterator[tuple[Any, str]]:
    """Yield the values of one column of a Parquet file, and where they are.

    The column is the first of `fields` that is there. Raises `ValueError` where none is, or the
    file is something else.
    """
    pyarrow = _pyarrow(path, "parquet")

    try:
        file = pyarrow.parquet.ParquetFile(_source(path, stream))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"path: {str(path)!r} is not a Parquet file ({error})") from None
    with file:
        name = _column(file.schema_arrow, fields, path)
        batches = file.iter_batches(_ROWS, columns=[name])
        yield from _values(path, (batch.column(0) for batch in batches))


def read_arrow(
    path: Path, stream: io.BufferedReader, fields: Sequence[str]
) -> Iterator[tuple[Any, str]]:
    """As `read_parquet`, of an Arrow file: a stream, as `datasets` writes it, or a Feather file."""
    pyarrow = _pyarrow(path, "ipc")

    source = _source(path, stream)
    try:
        try:
            reader = pyarrow.ipc.open_stream(source)
            batches: Any = reader
        except pyarrow.ArrowInvalid:
            if hasattr(source, "seek"):
                source.seek(0)
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"path: {str(path)!r} is not an Arrow file ({error})") from None
    name = _column(reader.schema, fields, path)
    columns = (batch.column(batch.schema.get_field_index(name)) for batch in batches)
    parts = (column.slice(at, _ROWS) for column in columns for at in range(0, len(column), _ROWS))
    yield from _values(path, parts)


def _pyarrow(path: Path, module: str):
    try:
        import pyarrow

        importlib.import_module(f"pyarrow.{module}")
    except ImportError:
        raise ImportError(
            f"path: reading {path.suffix} files needs pyarrow (pip install pyarrow)"
        ) from None
    return pyarrow


def _source(path: Path, stream: io.BufferedReader) -> Any:
    """Return what pyarrow reads: the file itself, mapped, or the content of a compressed one."""
    import pyarrow

    if getattr(stream, "raw", None) is not None and isinstance(stream.raw, io.FileIO):
        return pyarrow.memory_map(str(path))
    return pyarrow.BufferReader(stream.read())


def _column(schema: Any, fields: Sequence[str], path: Path) -> str:
    for field in fields:
        if field in schema.names:
            return field
    wanted = fields[-1] if fields[0] == "input_ids" else fields[0]
    raise ValueError(f"{path}: expected a column {wanted!r}, got {schema.names} (text_field)")


def _values(path: Path, columns: Iterator[Any]) -> Iterator[tuple[Any, str]]:
    import pyarrow

    row = 0
    try:
        for column in columns:
            kind = column.type
            lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
            numbers = lists and pyarrow.types.is_integer(kind.value_type)
            for value in column:
                if numbers and value.is_valid and not value.values.null_count:
                    # Not through Python's integers, which take 32 bytes each.
                    yield value.values.to_numpy(zero_copy_only=False).copy(), f"{path}: row {row}"
                else:
                    yield value.as_py(), f"{path}: row {row}"
                row += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected whole data after row {row}, got {reason}") from None
