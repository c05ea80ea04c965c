"""Files and folders that appear whole or not at all, and JSON that is read without surprises."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file inside a `with` block; at its end the new content takes the place of the old.

    A process that is killed at any moment leaves what was there before. Raises `OSError`.
    """
    # In the same folder, because a rename is atomic only within one file system.
    with _naming(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with _naming(path), os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _usual_mode(Path(temporary), 0o666)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an `OSError` that names none (a full disk) or the temporary one."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or f".{path.name}." in str(error.filename)
        if error.errno is None or not ours:
            raise
        raise type(error)(error.errno, os.strerror(error.errno), str(path)) from None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder inside a `with` block; at its end it stands under its name with all it holds.

    Until then it lies beside, under a hidden name, and a failure removes it. An empty folder of
    that name is replaced. Raises `OSError`, also where there is anything else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _usual_mode(file, 0o666)  # safetensors makes files that only their owner can read
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        _usual_mode(temporary, 0o777)
        os.rename(temporary, path)  # a folder takes the place of an empty one only
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _usual_mode(path: Path, mode: int) -> None:
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, mode & ~umask)


#: Digits of a whole number: a seed may have 128 bits, which is 39 digits.
_MOST_DIGITS = 39


def strict_json(text: str | bytes) -> Any:
    """Return the value that a JSON text spells.

    Raises `ValueError` with a reason, also for what Python's parser takes or stumbles over: a key
    that stands twice in an object, NaN and infinities, numbers that overflow, and values that are
    nested too deeply.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_distinct, parse_int=_whole, parse_float=_finite,
            parse_constant=_finite,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("values that are nested too deeply") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:40]!r}, which stands there twice")
    return made


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number that is not finite, {text[:20]}")
    return value
