"""Reading and writing the files behind `save` and `load` of `RescaleFactors` and `Tiers`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from longrope._files import replacing, strict_json

if TYPE_CHECKING:
    from longrope.factors.rescale import RescaleFactors

FACTORS, TIERS, VERSION = "longrope-factors", "longrope-tiers", 1
_FIELDS = {
    "lambdas", "start_tokens", "attention_factor", "original_length", "target_length",
    "rope_theta", "rotary_dim",
}  # fmt: skip
_SHARED = {"factors", "perplexity", "own_perplexity"}

#: A line of one number with a decimal comma, or of several that spaces or semicolons separate. (A
#: line of two whole numbers would be a layer of four rotated channels, which no model has.)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(?:[;\s]+[+-]?\d+(?:,\d+)?)*$")


def with_shared(factors: RescaleFactors) -> dict:
    """Return the fields of factors as files hold them, those of `shared` among them if known."""
    fields, shared = factors.as_fields(), factors.shared
    if shared is None:
        return fields
    return fields | {
        "shared": {
            "factors": shared.factors.as_fields(),
            "perplexity": shared.perplexity,
            "own_perplexity": shared.own_perplexity,
        }
    }


def write_json(path: Path, form: str, content: dict) -> None:
    """Write `content` so that `path` holds either what it held or all of the new.

    `form` is `FACTORS` or `TIERS`; factors are what `with_shared` returns.
    """
    if path.suffix.lower() == ".csv":
        raise ValueError(
            f"path: expected the name of a JSON file, got {str(path)!r}: a CSV file has no place "
            "for lengths and attention factors"
        )
    content = {"format": form, "version": VERSION} | content
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        reason = f"path: cannot write {path}: {error.strerror or error}"
        raise type(error)(error.errno or 0, reason) from None


def read(path: Path) -> list[dict] | list[float]:
    """Return what a file holds.

    The fields of each set of factors in a JSON file (one, or those of tiers), or the factors of a
    CSV file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = f"path: cannot read {path}: {error.strerror or error}"
        raise type(error)(error.errno or 0, reason) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected a JSON or CSV text file, got binary data") from None
    return _parse_json(path, text) if text.lstrip().startswith("{") else _parse_csv(path, text)


def states_settings(path: Path) -> bool:
    """Say whether a file of factors states their lengths and so on: JSON does, CSV does not."""
    return isinstance(read(path)[0], dict)


def _parse_json(path: Path, text: str) -> list[dict]:
    try:
        content = strict_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a file broken at {error}") from None
    form = content.pop("format", None)
    if form not in (FACTORS, TIERS):
        raise ValueError(f'{path}: expected a JSON file of format "{FACTORS}" or "{TIERS}"')
    version = content.pop("version", None)
    if version != VERSION:
        raise ValueError(f"{path}: expected format version {VERSION}, got {version!r}")
    if form == FACTORS:
        return [_fields(path, content)]
    tiers = content.get("tiers")
    # "about" says more of the tiers, for people and for longrope.checkpoints.
    if set(content) - {"about"} != {"tiers"} or not isinstance(tiers, list) or not tiers:
        raise ValueError(f'{path}: expected a list "tiers" of one or more sets of factors')
    return [_fields(path, tier) for tier in tiers]


def _fields(path: Path, content: object, may_share: bool = True) -> dict:
    found = set(content) if isinstance(content, dict) else set()
    if "shared" in found and may_share:  # beside factors by layer and head
        shared = content["shared"]
        if not isinstance(shared, dict) or set(shared) != _SHARED:
            raise ValueError(f'{path}: expected an object "shared" of {", ".join(sorted(_SHARED))}')
        rest = {key: value for key, value in content.items() if key != "shared"}
        within = shared | {"factors": _fields(path, shared["factors"], may_share=False)}
        return _fields(path, rest) | {"shared": within}
    for what, names in (("missing", _FIELDS - found), ("unknown", found - _FIELDS)):
        if names:
            raise ValueError(f"{path}: expected the fields of rescale factors, "
                             f"{what}: {', '.join(sorted(names))}")  # fmt: skip
    try:
        return content | {"lambdas": _numbers(content["lambdas"])}
    except TypeError:
        raise ValueError(f"{path}: lambdas: expected a list of numbers") from None


def _numbers(values: object) -> list:
    """Return a list of numbers, or of such lists; `TypeError` where it is none."""
    if not isinstance(values, list):
        raise TypeError
    found = []
    for value in values:
        if isinstance(value, list):
            found.append(_numbers(value))
        elif value == "inf":
            found.append(float("inf"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(value)
        else:
            raise TypeError
    return found


def _parse_csv(path: Path, text: str) -> list[float]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        if _DECIMAL_COMMA.match(line):
            raise ValueError(
                f"{path}: expected numbers with a decimal point on line {number}, got {line[:40]!r}"
            )
        try:
            rows.append([_number(cell) for cell in re.split(r"[,;\s]+", line.rstrip(",;"))])
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


def _number(cell: str) -> float:
    value = float(cell)
    if value in (float("inf"), -float("inf")) and cell.strip("+-")[:1].isdigit():
        raise ValueError  # digits that overflow
    return value
