"""The folder of a run: whose it is, and what is set aside when a run starts again."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope._files import replacing
from longrope.runs import times
from longrope.runs.journal import Journal, is_begun, named

CONFIG, JOURNAL = "config.json", "journal.jsonl"
#: What `longrope.report` writes into the folder of every run.
REPORT, ROWS, PLOTS = "report.html", "results.csv", "plots"


def noted(out: Path, name: str) -> Any:
    """Return what a run noted under a name when it began; None where there is none, or no run."""
    try:
        with open(out / JOURNAL, "rb") as file:
            return json.loads(file.readline())["notes"][name]
    except (OSError, ValueError, KeyError, TypeError):  # what is damaged, the run itself tells
        return None


def prepare(out: str | Path, kind: str, results: Sequence[str], resume: bool = True) -> Path:
    """Create the folder of a run and try to write in it.

    A folder that holds files of these names and no journal belongs to something else (a model has
    a `config.json` too) and is refused, and so is a journal of another kind. With `resume=False`
    the files of an earlier run are moved to a folder `previous-1`, `previous-2` and so on.

    Parameters
    ----------
    out
        The folder.
    kind
        As in `Journal`.
    results
        The names of the files that the run writes, beside `CONFIG` and `JOURNAL`.
    resume
        Whether an earlier run in the folder goes on.

    Raises
    ------
    ValueError
        With one sentence, for a folder that cannot be used.
    """
    if not isinstance(out, (str, os.PathLike)):
        raise ValueError(f"out: expected a path, got {type(out).__name__}")
    out = Path(out)
    trial = out / f".writable-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write to {str(out)!r} ({error.strerror})") from None
    begun = is_begun(out / JOURNAL, kind)
    names = (CONFIG, *results, REPORT, ROWS)
    others = [name for name in names if (out / name).exists()]
    if others and not begun:
        raise ValueError(
            f"out: expected a new folder or one of {named(kind)}, got {str(out)!r}, which holds "
            f"{others[0]} and no journal of {named(kind)}"
        )
    if begun and not resume:
        with Journal.locked(out / JOURNAL, kind):
            aside = next(p for n in itertools.count(1) if not (p := out / f"previous-{n}").exists())
            aside.mkdir()
            beside = [name for name in (times.TIMES, PLOTS) if (out / name).exists()]
            for name in (
                *others,
                *beside,
                JOURNAL,
            ):  # the journal last: a kill in between loses nothing
                os.replace(out / name, aside / name)
    return out


def write_config(out: Path, config: Mapping[str, Any]) -> None:
    """Write what the run was asked to do, for people; the journal's header is what binds.

    The run has begun by then, or goes on: its times have another line.
    """
    times.began(out)
    write_text(out / CONFIG, json.dumps(config, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader never sees half of it."""
    with replacing(path) as file:
        file.write(text.encode())


def write_table(path: str | Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Replace a CSV file as a whole. Raises `OSError` with one sentence where it cannot."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(Path(path), table.getvalue())
