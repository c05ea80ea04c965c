"""Reading and writing the files behind `RescaleFactors.save` and `load`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from longrope._files import replacing

FORMAT, VERSION = "longrope-factors", 1


def write_json(path: Path, settings: dict) -> None:
    """Write `settings` so that `path` holds either the old content or all of the new one."""
    text = json.dumps({"format": FORMAT, "version": VERSION} | settings, indent=1) + "\n"
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        reason = f"path: cannot write {path}: {error.strerror or error}"
        raise type(error)(error.errno or 0, reason) from None


def read(path: Path) -> dict | list[float]:
    """Return the fields of a JSON file, or the factors of a CSV file as a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = f"path: cannot read {path}: {error.strerror or error}"
        raise type(error)(error.errno or 0, reason) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected a JSON or CSV text file, got binary data") from None
    return _parse_json(path, text) if text.lstrip().startswith("{") else _parse_csv(path, text)


def _parse_json(path: Path, text: str) -> dict:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got a file broken at {error}") from None
    if content.pop("format", None) != FORMAT:
        raise ValueError(f'{path}: expected a JSON file of format "{FORMAT}"')
    version = content.pop("version", None)
    if version != VERSION:
        raise ValueError(f"{path}: expected format version {VERSION}, got {version!r}")
    fields = {
        "lambdas", "start_tokens", "attention_factor", "original_length", "target_length",
        "rope_theta", "rotary_dim",
    }  # fmt: skip
    for what, names in (("missing", fields - set(content)), ("unknown", set(content) - fields)):
        if names:
            raise ValueError(f"{path}: expected the fields of rescale factors, "
                             f"{what}: {', '.join(sorted(names))}")  # fmt: skip
    if not isinstance(content["lambdas"], list):
        raise ValueError(f"{path}: lambdas: expected a list of numbers")
    return content


def _parse_csv(path: Path, text: str) -> list[float]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        try:
            rows.append([float(cell) for cell in re.split(r"[,;\s]+", line.rstrip(",;"))])
        except ValueError:
            raise ValueError(
                f"{path}: expected numbers on line {number}, got {line[:40]!r}"
            ) from None
    if not rows:
        raise ValueError(f"{path}: expected rescale factors, got an empty file")
    if all(len(row) == 1 for row in rows):
        return [row[0] for row in rows]
    for number, row in enumerate(rows[1:], start=2):
        if row != rows[0]:
            raise ValueError(
                f"{path}: expected the same factors in every layer (row), "
                f"rows 1 and {number} differ"
            )
    return rows[0]
