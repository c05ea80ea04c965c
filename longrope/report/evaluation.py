"""The report of `longrope.evaluate`: every measure by length, for every set of factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.report import figures
from longrope.report.page import Figure, Page, Row, Section, Table
from longrope.report.parts import flat, lambda_figure
from longrope.report.passkey import map_figure
from longrope.runs import journal, style
from longrope.runs.folder import JOURNAL

KIND = "evaluation"
AS_LOADED = "as loaded"
#: Of many documents the hashes of so many are told; the journal has all.
_HASHES = 6
#: What the value of a task is, its digits, and whether less (-1) or more is better.
TASKS = {
    "perplexity": ("perplexity", 4, -1),
    "passkey": ("passkey, share of right trials", 2, 1),
    "ruler": ("RULER-synthetic-6, share", 3, 1),
    "longppl": ("LongPPL", 4, -1),
}


def page(out: Path, shown: str) -> Page:
    """Return the report of an evaluation, finished or not."""
    header, entries = journal.read(out / JOURNAL)
    names, tasks, lengths = header["sets"], header["tasks"], header["lengths"]
    figures_of = {(e["task"], e["set"], e["length"]): e for e in entries}
    finished = len(figures_of) == len(names) * len(tasks) * len(lengths)
    asked = {
        k: header[k]
        for k in ("tasks", "lengths", "sets", "tiers", "trials", "samples", "seed", "bos", "model")
    }
    longest = max(lengths)
    found = Page(
        title=f"Evaluation up to {longest} tokens",
        lead=f"{_sentence(', '.join(TASKS[t][0] for t in tasks))}, for the model as loaded and "
        f"{len(names) - 1} sets of factors.",
        finished=finished,
        settings=flat(asked | {"documents": _hashes(header["documents"])}),
    )
    found.facts = list(_facts(figures_of, tasks, names, longest))
    drawn = dict(zip(names, looks(names), strict=True))
    for task in tasks:
        of_task = {key: e for key, e in figures_of.items() if key[0] == task}
        found.sections.append(_section(task, of_task, names, lengths, drawn))
        for (_, name, length), e in of_task.items():
            found.rows.append(Row(task, name, 0, length, e["value"], e["low"], e["high"], e["n"]))
            if task == "perplexity":
                found.rows += [
                    Row("perplexity by position", name, a, b, v, None, None, None)
                    for a, b, v in e["detail"] or ()
                ]
    factors = _factors(header["factors"], drawn)
    if factors:
        found.sections.append(Section("Rescale factors", figures=[factors]))
    return found


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _hashes(documents: Sequence[str]) -> str:
    more = ", ..." if len(documents) > _HASHES else ""
    return f"{len(documents)}, hashes {', '.join(documents[:_HASHES])}{more}"


def _facts(entries: Mapping[tuple, Any], tasks: Sequence[str], names: Sequence[str], length: int):
    for task in tasks:
        label, digits, sign = TASKS[task]
        reached = {n: entries[task, n, length]["value"] for n in names
                   if (task, n, length) in entries}  # fmt: skip
        known = {n: v for n, v in reached.items() if v is not None}
        if known:
            best = (min if sign < 0 else max)(known, key=lambda n: known[n])
            yield (
                f"best {label.partition(',')[0]} at {length}",
                f"{known[best]:.{digits}f} ({best})",
            )


def _section(
    task: str, entries: Mapping[tuple, Any], names: Sequence[str], lengths: Sequence[int],
    styles: Mapping[str, Mapping[str, Any]],
) -> Section:  # fmt: skip
    label, digits, sign = TASKS[task]
    section = Section(_sentence(label))
    rows = []
    for name in names:
        cells = [entries.get((task, name, length)) for length in lengths]
        rows.append([name, *(None if e is None else e["value"] for e in cells)])
    section.tables.append(Table(["tokens", *map(str, lengths)], rows, best=sign, digits=digits))
    if not any(e["value"] is not None for e in entries.values()):
        section.paragraphs.append("No figure yet." if not entries else "No length had a figure.")
        return section
    if len(lengths) > 1:
        section.figures.append(_by_length(task, entries, names, lengths, styles))
    if task == "perplexity":
        drawn = _by_position(entries, names, styles)
        if drawn is not None:
            section.figures.append(drawn)
    if task == "passkey":
        trials: dict[str, list[tuple[int, float, bool]]] = {name: [] for name in names}
        for (_, name, _), entry in entries.items():
            trials[name] += [(int(t[0]), float(t[2]), bool(t[4])) for t in entry["detail"]]
        section.figures.append(map_figure("passkey", trials))
    if task == "ruler":
        section.tables += _ruler(entries, names, lengths)
    return section


def _by_length(
    task: str, entries: Mapping[tuple, Any], names: Sequence[str], lengths: Sequence[int],
    styles: Mapping[str, Mapping[str, Any]],
) -> Figure:  # fmt: skip
    label = TASKS[task][0]
    curves = []
    for name in names:
        known = [entries[task, name, n] for n in lengths if (task, name, n) in entries]
        known = [e for e in known if e["value"] is not None]
        curves.append(
            figures.Curve(
                styles[name],
                [e["length"] for e in known],
                [e["value"] for e in known],
                [e["low"] for e in known],
                [e["high"] for e in known],
            )
        )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        draw_by_length(axes, task, curves, lengths)
        figures.legend(figure)

    name = f"{task}-by-length"
    return Figure(name, f"{_sentence(label)}, by length.", draw, figures.SIZE)


def draw_by_length(
    axes: Any, task: str, curves: Sequence[figures.Curve], lengths: Sequence[int]
) -> None:
    """Draw what a task came to, by length: a share from 0 to 1, a perplexity on its own axis."""
    figures.draw_curves(axes, curves, log_y=None if TASKS[task][2] < 0 else False)
    if TASKS[task][2] > 0:
        axes.set_ylim(-0.03, 1.03)
    figures.lengths_axis(axes, lengths, "tokens")
    axes.set_ylabel(TASKS[task][0])


def _by_position(
    entries: Mapping[tuple, Any], names: Sequence[str], styles: Mapping[str, Mapping[str, Any]]
) -> Figure | None:
    """Return the perplexity by position in the longest windows."""
    whole = [e for e in entries.values() if e["detail"]]
    longest = max((e["length"] for e in whole), default=0)
    parts = {e["set"]: e["detail"] for e in whole if e["length"] == longest}
    if not parts:
        return None
    ends = [end for _, end, _ in next(iter(parts.values()))]
    curves = [
        figures.Curve(styles[name], ends, [math.nan if v is None else v for *_, v in parts[name]])
        for name in names
        if name in parts and len(parts[name]) == len(ends)
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        figures.draw_curves(axes, curves)
        figures.lengths_axis(axes, ends, f"position in windows of {longest}, up to")
        axes.set_ylabel("perplexity")
        figures.legend(figure)

    caption = f"Perplexity by position in windows of {longest} tokens."
    return Figure("perplexity-by-position", caption, draw, figures.SIZE)


def _ruler(
    entries: Mapping[tuple, Any], names: Sequence[str], lengths: Sequence[int]
) -> list[Table]:
    tables = []
    for length in lengths:
        found = {n: entries["ruler", n, length]["detail"] for n in names
                 if ("ruler", n, length) in entries}  # fmt: skip
        tasks = list(next(iter(found.values()), None) or ())
        if tasks:
            rows = [[name, *(score.get(task) for task in tasks)] for name, score in found.items()]
            tables.append(Table(["", *tasks], rows, f"Scores at {length} tokens.", 1, 2))
    return tables


def _factors(sets: Mapping[str, Any], styles: Mapping[str, Any]) -> Figure | None:
    """Return lambda by dimension of every set; of tiers the last, which reaches farthest."""
    drawn = [
        (styles[name], np.array(fields[-1]["lambdas"]).astype(float))  # from text: JSON has no inf
        for name, fields in sets.items()
        if fields
    ]
    return lambda_figure("factors", drawn) if drawn else None


def looks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return how the curve of each set is drawn: a known name in its own style, others in order."""
    known = {AS_LOADED: "none"} | {name: name for name in style.STYLES}
    used = [known[name] for name in names if name in known]
    rest = iter([name for name in ("gradient", "evolution", "hybrid", *style.STYLES)
                 if name not in used])  # fmt: skip
    drawn = []
    for name in names:
        chosen = known.get(name) or next(rest, "gradient")
        drawn.append(style.line(chosen, label=name))
    return drawn
