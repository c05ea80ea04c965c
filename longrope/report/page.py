"""What a report holds, before it is HTML: sections of text, tables and figures, and rows of CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A plot, drawn when it is needed.

    `name` is that of its files, without an ending; `caption` says what it shows, and serves readers
    who do not see it; `draw` draws into a `matplotlib.figure.Figure` of `size`, in inches.
    """

    name: str
    caption: str
    draw: Callable[[Any], None]
    size: tuple[float, float]


class Table(NamedTuple):
    """Rows of cells under a head; the first cell of a row names it.

    `best` is the place of the least (-1) or greatest (1) value of each column that is marked, 0: of
    none. Cells are text, or numbers, which are written with `digits` behind the point.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    best: int = 0
    digits: int = 2

    def cells(self) -> list[list[tuple[str, bool]]]:
        """Return the text of every cell, and whether it is the best of its column."""
        marked: list[float | None] = []
        for column in zip(*(row[1:] for row in self.rows), strict=True):
            numbers = [v for v in column if isinstance(v, float) and math.isfinite(v)]
            several = self.best and len(numbers) > 1
            marked.append((min if self.best < 0 else max)(numbers) if several else None)
        return [
            [(str(row[0]), False)]
            + [(self._text(v), v == best) for v, best in zip(row[1:], marked, strict=True)]
            for row in self.rows
        ]

    def _text(self, value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if not isinstance(value, float):
            return str(value)
        return f"{value:.{self.digits}f}" if abs(value) < 1e5 else f"{value:.3g}"


class Command(NamedTuple):
    """Something to type, and what it is good for."""

    text: str
    about: str = ""


@dataclass
class Section:
    """A heading and what stands under it, in this order; links are relative addresses and words."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)


class Row(NamedTuple):
    """A line of `results.csv`.

    Attributes
    ----------
    measure
        `"perplexity"`, `"lambda"`, `"loss"` and so on.
    set
        Of which factors, stage or task.
    begin, end
        Where: positions `begin` to before `end` of windows, in tokens; of a lambda the pair of
        dimensions, of a loss the step, of what has no range its length in `end`.
    value, low, high
        The value, and the ends of its 95 % interval.
    n
        What it is a mean of: tokens, trials, samples.
    """

    measure: str
    set: str
    begin: float | None
    end: float | None
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass
class Page:
    """A report.

    Attributes
    ----------
    title, lead
        What ran, in a line; and what came of it, in a sentence or two.
    finished
        Whether the run came to its end.
    facts
        Pairs of a label and a value to see at first sight.
    sections
        In order.
    settings
        Pairs of a name and a value: what the run was asked to do.
    rows
        Everything that the figures show, as `results.csv` has it.
    cover
        The name of the figure that lies beside the report too, as PNG.
    """

    title: str
    lead: str
    finished: bool
    facts: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    settings: list[tuple[str, str]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    cover: str | None = None

    def figures(self) -> list[Figure]:
        """Return the figures of all sections."""
        return [figure for section in self.sections for figure in section.figures]


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV file that a run wrote.

    Raises `ValueError` in one sentence where the file is not of these columns, or cut off.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a CSV file, got a damaged one ({error})") from None
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}: expected a column {missing[0]!r}, got {reader.fieldnames}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValueError(f"{path}: line {number} is damaged (not {len(columns)} or more cells)")
    return rows


def number(path: Path, name: str, text: str) -> float:
    """Return a number of a CSV file; `ValueError` names the file and the column."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path}: {name}: expected a number, got {text[:40]!r}") from None
