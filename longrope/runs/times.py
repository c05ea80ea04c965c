"""When a run began and ended, with which versions, and by which command: a line for each process.

Beside the journal, because none of it may change a result: a resumed run has other times.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from longrope._files import strict_json

TIMES = "times.jsonl"


class _Process:
    """What this process was started as; the command line sets it, a library call does not."""

    command: str | None = None


def came_from(arguments: Sequence[str]) -> None:
    """Say that the `longrope` command started this process, with these arguments."""
    _Process.command = " ".join(["longrope", *map(quoted, arguments)])


def began(out: Path) -> None:
    """Add a line to the times of a run: it begins, or goes on after a kill."""
    import torch

    _append(out, {
        "began": _now(),
        "command": _Process.command,
        "longrope": sys.modules["longrope"].__version__,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    })  # fmt: skip


def ended(out: Path) -> None:
    """Add a line to the times of a run: this process came to its end."""
    _append(out, {"ended": _now()})


def read(out: Path) -> list[dict[str, Any]]:
    """Return an entry for each process of a run, with `ended` where it came to its end.

    Lines that are damaged, as a kill in the middle of one leaves them, are left out.
    """
    try:
        lines = (out / TIMES).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    entries: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = strict_json(line)
        except ValueError:
            continue
        if not isinstance(entry, dict):
            continue
        if "began" in entry:
            entries.append(entry)
        elif "ended" in entry and entries:
            entries[-1]["ended"] = entry["ended"]
    return entries


def seconds(entry: dict[str, Any]) -> float | None:
    """Return how long a process ran; None where it did not come to its end."""
    try:
        first, last = (datetime.fromisoformat(entry[name]) for name in ("began", "ended"))
        return (last - first).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def quoted(argument: str) -> str:
    """Return an argument as a shell reads it, a path under the home folder without its name."""
    name, equals, value = argument.partition("=")
    if equals and name.startswith("--"):  # where no shell expands a tilde
        return f"{name}={_below_home(place(value), '$HOME')}"
    return _below_home(place(argument), "~")


def place(path: str | Path) -> str:
    """Return a path from the working folder or the home folder, where it is in one of them."""
    text = str(path)
    if not os.path.isabs(text):
        return text
    for find, start in ((Path.cwd, ""), (Path.home, "~/")):
        try:
            base = find()
        except (OSError, RuntimeError):  # a working folder that is gone, a user without a home
            continue
        if text != str(base) and base != Path(base.anchor) and Path(text).is_relative_to(base):
            return start + str(Path(text).relative_to(base))
    return text


def _below_home(text: str, home: str) -> str:
    return f"{home}/{shlex.quote(text[2:])}" if text.startswith("~/") else shlex.quote(text)


def _append(out: Path, entry: dict[str, Any]) -> None:
    # Without fsync: a line that a crash loses is a time, not a result.
    with (out / TIMES).open("a+b") as file:
        torn = False  # the end of a line that a kill cut off
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
