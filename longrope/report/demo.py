"""The report of `longrope demo`: every method by window, and its searches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from longrope.factors import RescaleFactors, Tiers
from longrope.report import figures, search
from longrope.report.page import Figure, Page, Row, Section, Table, number, read_csv
from longrope.report.parts import lambda_figure, refer, tier_figure, tier_rows
from longrope.report.search_data import KIND, RULES, Search
from longrope.runs import journal
from longrope.runs.folder import JOURNAL
from longrope.runs.style import METHODS, STYLES, Style, line

PERPLEXITY, TIERS = "perplexity.csv", "tiers.json"
_SEARCHES = "search-*"


def is_one(out: Path) -> bool:
    """Say whether a folder is that of a demo: searches side by side, and in the end a table."""
    return not (out / JOURNAL).exists() and any(_searches(out))


def _searches(out: Path) -> list[Path]:
    found = (p for p in sorted(out.glob(_SEARCHES)) if not p.is_symlink())
    return [p for p in found if journal.kind_of(p / JOURNAL) == KIND]


def page(out: Path, shown: str) -> Page:
    """Return the report of a demo, finished or not."""
    found = Page(
        title="The demo: a small model's window, 8 times as long",
        lead="Every method for the packaged byte-level model, on files of Python's library that "
        "neither its training nor a search has seen.",
        finished=(out / PERPLEXITY).is_file(),
    )
    if found.finished:
        lengths, table = read(out / PERPLEXITY)
        found.sections.append(_perplexity(lengths, table))
        found.rows += [
            Row("perplexity", name, 0, length, value)
            for name, row in table.items()
            for length, value in zip(lengths, row, strict=True)
        ]
        least = min(table, key=lambda name: table[name][-1])
        found.facts = [(f"best at {lengths[-1]}", f"{table[least][-1]:.2f} ({least})")]
        for name, words in (("YaRN", "YaRN"), ("none", "as loaded")):
            if name in table:
                found.facts.append((f"{words} at {lengths[-1]}", f"{table[name][-1]:.2f}"))
    else:
        words = "The perplexities of all methods are measured when the searches are done."
        found.sections.append(Section("Perplexity by window", [words]))
    runs = {path.name: Search.read(path) for path in _searches(out)}
    found.sections += _factors(out, runs, found)
    section = Section("Convergence of the searches")
    for name, run in runs.items():
        words = name.replace("-", " by ", 1)
        drawn = search.convergence(run, f"convergence-{run.header['method']}", f"{words}: ")
        if drawn is not None:
            section.figures.append(drawn)
        if run.passes is not None:
            found.facts.append((f"passes, {run.header['method']}", f"{run.passes:.0f}"))
        found.rows += [row._replace(set=f"{name}: {row.set}") for row in search.rows(run)]
        refer(section, out, name, shown, f"{words} in detail")
    found.sections.append(section)
    seeds = {run.header["seed"] for run in runs.values()}
    found.settings = [("seed", ", ".join(map(str, sorted(seeds))))]
    for name, run in runs.items():
        asked = ("samples", "steps", "iterations", "population", "mutations", "crossovers",
                 "parents", "mutation probability")  # fmt: skip
        found.settings += [(f"{name}: {k}", v) for k, v in run.settings() if k in asked]
    return found


def read(path: Path) -> tuple[list[int], dict[str, list[float]]]:
    """Return the lengths and each method's perplexities; `ValueError` where it is damaged."""
    rows = read_csv(path, ("method",))
    names = [name for name in rows[0] if name != "method"] if rows else []
    if not names or not all(re.fullmatch(r"[1-9]\d{0,8}", name) for name in names):
        raise ValueError(f"{path}: expected a column for each length, got {names}")
    table = {r["method"]: [number(path, name, r[name]) for name in names] for r in rows}
    return [int(name) for name in names], table


def style_of(name: str) -> Style:
    """Return how a method of the table is drawn, known by its label or its name."""
    for key, style in STYLES.items():
        if name in (style.label, key):
            return style
    return Style(name, "#888888", ".")


def drawn(table: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the rows that a figure shows: of the closed forms PI, NTK, YaRN and the best other.

    All of them would not stay legible.
    """
    shown = {STYLES[name].label for name in ("none", *RULES, *METHODS)}
    others = {name: row[-1] for name, row in table.items() if name not in shown}
    best = min(others, key=lambda name: others[name], default=None)
    return {name: row for name, row in table.items() if name in shown or name == best}


def draw_perplexity(axes: Any, lengths: list[int], table: dict[str, list[float]]) -> None:
    """Draw the perplexity of methods by window."""
    curves = [
        figures.Curve(style_of(name)._asdict() | {"markersize": 4, "label": name}, lengths, row)
        for name, row in table.items()
    ]
    figures.draw_curves(axes, curves)
    if "none" in table:
        axes.axhline(table["none"][0], color="0.7", linestyle=":", linewidth=1, zorder=0)
    figures.lengths_axis(axes, lengths, "window, tokens")
    axes.set_ylabel("perplexity, unseen files")


def _perplexity(lengths: list[int], table: dict[str, list[float]]) -> Section:
    def draw(figure: Any) -> None:
        draw_perplexity(figure.subplots(), lengths, drawn(table))
        figures.legend(figure)

    words = "The same text in windows of each size. The dotted line is the model in its own window."
    head = ["window", *(f"{length} ({length // lengths[0]}x)" for length in lengths)]
    return Section(
        "Perplexity by window",
        [words],
        [Figure("perplexity-by-window", "Perplexity by window.", draw, figures.SIZE)],
        [Table(head, [[name, *row] for name, row in table.items()], best=-1)],
    )


def _factors(out: Path, runs: dict[str, Search], found: Page) -> list[Section]:
    section = Section("Rescale factors")
    known = {name: run.factors for name, run in runs.items() if run.factors is not None}
    if known:
        last = next(iter(known.values()))
        lengths = {
            name: getattr(last, name)
            for name in ("original_length", "target_length", "rope_theta", "rotary_dim")
        }
        sets = [(line(n), getattr(RescaleFactors, n)(**lengths).lambdas)
                for n in ("none", "pi", "ntk", "yarn")]  # fmt: skip
        for name, factors in known.items():
            sets.append((line(runs[name].header["method"]), factors.lambdas))
        section.figures.append(lambda_figure("factors", sets))
    if (out / TIERS).is_file():
        tiers = Tiers.load(out / TIERS)
        section.figures.append(tier_figure("tiers", tiers))
        found.rows += tier_rows(tiers)
    return [section] if section.figures else []
