"""The report of passkey retrieval: how often a key was found, by length and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.report import plots
from longrope.report.intervals import proportion_interval
from longrope.report.page import Figure, Page, Row, Section, Table, number, read_csv
from longrope.report.parts import flat, json_object

TRIALS, SETTINGS = "passkey.csv", "passkey.json"
#: The bands of depth that the map shows.
BANDS = 10


def page(out: Path, shown: str) -> Page:
    """Return the report of a folder of `longrope passkey`."""
    trials = read(out / TRIALS)
    lengths = sorted({length for length, _, _ in trials})
    asked = json_object(out / SETTINGS) if (out / SETTINGS).is_file() else {}
    found = Page(
        title="Passkey retrieval",
        lead=f"Five digits that a prompt said once, asked for at its end: {len(trials)} prompts of "
        f"{lengths[0]} to {lengths[-1]} tokens.",
        finished=True,
        settings=flat(asked),
    )
    right = sum(hit for _, _, hit in trials)
    found.facts = [("right", f"{right} of {len(trials)}")]
    whole = [length for length in lengths if all(hit for n, _, hit in trials if n == length)]
    found.facts.append(("longest length without a mistake", str(max(whole, default="none"))))
    rows = []
    for length in lengths:
        hits = [hit for n, _, hit in trials if n == length]
        share, n = sum(hits) / len(hits), len(hits)
        low, high = proportion_interval(sum(hits), n)
        rows.append([str(length), f"{sum(hits)} of {n}", share, f"{low:.0%} to {high:.0%}"])
        found.rows.append(Row("passkey", "the model", None, length, share, low, high, n))
    found.sections.append(
        Section(
            "By length and depth",
            ["Depth is the share of the filler before the key. A number is the share of right "
             "prompts of a band, in percent."],
            [map_figure("passkey", {"": trials})],
            [Table(["tokens", "right", "share", "95 % interval"], rows)],
        )
    )  # fmt: skip
    return found


_COLUMNS = ("length", "depth", "right")


def read(path: Path) -> list[tuple[int, float, bool]]:
    """Return `(length, depth, right)` of every trial; `ValueError` where the file is damaged."""
    rows = read_csv(path, _COLUMNS)
    if not rows:
        raise ValueError(f"{path}: expected at least one trial, got none")
    trials = []
    for row in rows:
        length, depth, right = (number(path, name, row[name]) for name in _COLUMNS)
        if not (1 <= length < 2**53 and length == int(length)):
            raise ValueError(f"{path}: length: expected a whole number above 0, got {length:g}")
        if not 0 <= depth <= 1:
            raise ValueError(f"{path}: depth: expected a number from 0 to 1, got {depth:g}")
        trials.append((int(length), depth, right > 0.5))
    return trials


def bands(trials: Sequence[tuple[int, float, bool]]) -> tuple[np.ndarray, list[int]]:
    """Return the share of right trials by band of depth and length, and the lengths.

    float64 `[BANDS, lengths]`, the shallowest band first, NaN where there is no trial.
    """
    lengths = sorted({length for length, _, _ in trials})
    table = np.full((BANDS, len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        # Stratified places lie between the ends of a band; a rounded one may lie on its end.
        placed = [
            (min(int(depth * BANDS), BANDS - 1), hit) for n, depth, hit in trials if n == length
        ]
        for band in {place for place, _ in placed}:
            table[band, column] = np.mean([hit for place, hit in placed if place == band])
    return table, lengths


def map_figure(name: str, sets: Mapping[str, Sequence[tuple[int, float, bool]]]) -> Figure:
    """Return the maps of several sets of factors, by their names."""
    tables = {title: bands(trials) for title, trials in sets.items() if trials}

    def draw(figure: Any) -> None:
        plots.draw_maps(figure, tables)

    most = max((len(lengths) for _, lengths in tables.values()), default=1)
    size = plots.map_size(len(tables), most)
    return Figure(name, "Share of right prompts in percent, by depth and length.", draw, size)
