"""Checkpoints of a stage of fine-tuning: complete ones carry a marker, all others are skipped.

A checkpoint is what transformers' Trainer writes (weights in safetensors, the optimizer, the
schedule and the random state, which it reads with `weights_only`), and, last, the marker: the name
and size of every file, written when all of them are on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from longrope._files import replacing, strict_json

MARKER = "complete.json"


def step_of(folder: Path) -> int:
    """Return the number of optimizer steps that a checkpoint has behind it."""
    return int(folder.name.rpartition("-")[2])


def mark(folder: Path) -> None:
    """Mark a checkpoint complete, once its files are durable."""
    sizes = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sizes[str(file.relative_to(folder))] = file.stat().st_size
    with replacing(folder / MARKER) as written:
        written.write(json.dumps(sizes, indent=2).encode())


def is_complete(folder: Path) -> bool:
    """Say whether a checkpoint carries the marker, and has every file that it names."""
    try:
        sizes = strict_json((folder / MARKER).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):  # the last of JSON that is no object
        return False


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints of a stage, complete or not, by the number of their steps."""
    found = (path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(found, key=step_of)


def last_complete(folder: Path, clear: bool = True) -> Path | None:
    """Return the complete checkpoint with the most steps; with `clear` others are removed."""
    complete = None
    for path in checkpoints(folder):
        if is_complete(path):
            complete = path
        elif clear:
            shutil.rmtree(path)
    return complete


def remove_all(folder: Path) -> None:
    """Remove all checkpoints of a stage."""
    for path in checkpoints(folder):
        shutil.rmtree(path)


def forget(folder: Path, keep: int) -> None:
    """Remove all complete checkpoints but the last `keep`."""
    complete = [path for path in checkpoints(folder) if is_complete(path)]
    for path in complete[:-keep]:
        (path / MARKER).unlink()  # first, so that half a checkpoint has none
        shutil.rmtree(path)
