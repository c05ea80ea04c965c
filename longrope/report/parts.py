"""What the reports of several kinds of runs have in common: plots and rows of factors, settings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from longrope._files import strict_json
from longrope.factors import RescaleFactors
from longrope.report import figures, plots
from longrope.report.page import Command, Figure, Row, Section
from longrope.runs import style
from longrope.runs.folder import REPORT


def lambda_figure(name: str, sets: Sequence[tuple[Mapping[str, Any], np.ndarray]]) -> Figure:
    """Return the plot of lambda by pair of dimensions."""

    def draw(figure: Any) -> None:
        plots.draw_factors(figure.subplots(), sets)
        figures.legend(figure)

    return Figure(name, "Rescale factor by pair of dimensions.", draw, figures.SIZE)


def tier_figure(name: str, tiers: Sequence[RescaleFactors]) -> Figure:
    """Return the plot of lambda of every tier."""
    looks = plots.tier_looks([tier.target_length for tier in tiers])
    made = lambda_figure(name, list(zip(looks, (t.lambdas for t in tiers), strict=True)))
    return made._replace(caption="Rescale factor by pair of dimensions, for every tier.")


def factor_rows(name: str, lambdas: np.ndarray) -> list[Row]:
    """Return lines of `results.csv` for a set of factors; of many heads their median."""
    each = np.asarray(lambdas, float).reshape(-1, np.shape(lambdas)[-1])
    return [
        Row("lambda", name, i, i + 1, float(value)) for i, value in enumerate(np.median(each, 0))
    ]


def tier_rows(tiers: Sequence[RescaleFactors]) -> list[Row]:
    """Return lines of `results.csv` for tiers."""
    return [r for t in tiers for r in factor_rows(f"tier to {t.target_length}", t.lambdas)]


def refer(section: Section, out: Path, inner: str, shown: str, words: str) -> None:
    """Let a section lead to the report of a run in a folder of a run, or say how it is made."""
    if (out / inner / REPORT).is_file():
        section.links.append((f"{quote(inner)}/{REPORT}", words))
    else:
        section.commands.append(Command(f"longrope report {shown}/{shlex.quote(inner)}", words))


def json_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file of a run holds; `ValueError` in one sentence where it is damaged."""
    try:
        content = strict_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a damaged file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def flat(found: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Return nested settings as pairs of a name and its value; None is left out."""
    rows: list[tuple[str, str]] = []
    for name, value in found.items():
        words = f"{above}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += flat(value, f"{words}: ")
        elif value is not None:
            many = isinstance(value, (list, tuple))
            rows.append((words, ", ".join(map(str, value)) if many else str(value)))
    return rows


def label(name: str) -> str:
    """Return the label of a method of `longrope.runs.style`; other names are their own."""
    return plots.look_of(name).label if name in style.STYLES else name
