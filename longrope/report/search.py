"""The report of a search: what was reached, how it went, what was found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from longrope._numbers import perplexity_of
from longrope.factors import RescaleFactors
from longrope.factors.heads import span
from longrope.factors.tiers import ladder_targets
from longrope.report import figures, plots
from longrope.report.heads import head_figure
from longrope.report.page import Command, Figure, Page, Row, Section, Table
from longrope.report.parts import factor_rows, label, lambda_figure, tier_figure, tier_rows
from longrope.report.search_data import (
    BEST,
    CLOSED_FORMS,
    FACTORS,
    FOUND,
    RULES,
    TIERS,
    WINDOWS,
    YARN_LADDER,
    Search,
)
from longrope.runs.folder import JOURNAL
from longrope.runs.style import line


def page(out: Path, shown: str) -> Page:
    """Return the report of a search; `shown` is the path of its folder for commands."""
    run = Search.read(out)
    target = run.problem["target_length"]
    deciding = run.deciding
    found = Page(
        title=f"Rescale factors for {target} tokens",
        lead=f"A search by {run.header['method']} for the window of {target} tokens of a model "
        f"that was trained for {run.problem['original_length']}.",
        finished=run.finished,
        settings=run.settings(),
    )
    values = run.by_set()
    if run.ladder:
        values.pop("yarn", None)  # of the last tier's range alone
    ours = f"perplexity, {WINDOWS[deciding]}"
    names = {FOUND: ours, BEST: f"{ours}, {BEST}", "yarn": "with YaRN", "none": "as loaded"}
    for name, words in names.items():
        if values.get(name, {}).get(deciding) is not None:
            found.facts.append((words, f"{values[name][deciding]:.3f}"))
    if run.passes is not None:
        found.facts.append(("cost, forward passes of a window", f"{run.passes:.0f}"))
    if run.factors is not None:
        found.facts.append(("attention factor", span(run.factors.attention_factor)))
        found.facts.append(("start tokens", str(run.factors.start_tokens)))
    found.sections = [*_perplexities(run, shown), *_factors(run)]
    found.rows = rows(run)
    found.cover = next((f.name for f in found.figures() if f.name == "search"), None)
    return found


def _perplexities(run: Search, shown: str) -> list[Section]:
    """Return what was reached, how the search went, and what it does not say."""
    reached = Section("Perplexity", tables=_tables(run))
    if run.ladder:
        reached.paragraphs.append(
            "Each tier was measured on its own range of positions, behind the tiers below it."
        )
    if not reached.tables:
        reached.paragraphs.append("Nothing was measured yet.")
    rest = Section(
        "By position, on text that no search has seen",
        ["A search measures whole windows, and chooses by them. For the perplexity by position "
         "beside the model as loaded, PI, NTK and YaRN, and for passkey retrieval, give it "
         "other text; the second command puts the figures into this report."],
        commands=[Command(_evaluate(run, shown)), Command(f"longrope report {shown}")],
    )  # fmt: skip
    nested = (run.out / "evaluation" / JOURNAL).is_file()
    return [reached, *_convergence(run), *([] if nested else [rest])]


def _evaluate(run: Search, shown: str) -> str:
    original, target = run.problem["original_length"], run.problem["target_length"]
    lengths = [original, *ladder_targets(original, target)]
    file = TIERS if run.ladder else FACTORS
    return (
        f"longrope evaluate MODEL UNSEEN --lengths {','.join(map(str, lengths))} "
        f"--factors {shown}/{file} --baselines pi,ntk,yarn --ladder --out {shown}/evaluation"
    )


def _tables(run: Search) -> list[Table]:
    if run.ladder:
        return _ladder_tables(run)
    values = run.by_set()
    roles = [role for role in WINDOWS if any(role in row for row in values.values())]
    if not values:
        return []
    rows = [[label(name), *(row.get(role) for role in roles)] for name, row in values.items()]
    head = ["perplexity of whole windows", *(WINDOWS[role] for role in roles)]
    return [Table(head, rows, best=-1, digits=3)]


def _ladder_tables(run: Search) -> list[Table]:
    role, ends = run.deciding, run.ladder["targets"]
    columns = []
    for number in range(1, len(ends) + 1):
        entries = [e for e in run.of(number) if e["role"] == role]
        ladder = [e for e in entries if e.get("origin") == YARN_LADDER]
        losses = [e["nll"] for e in entries if e not in ladder and e["nll"] is not None]
        column: dict[str, float] = run.reached(number, role)
        if ladder or (number == 1 and "yarn" in column):
            column[YARN_LADDER] = perplexity_of(ladder[-1]["nll"]) if ladder else column["yarn"]
        if losses:
            column[FOUND] = perplexity_of(min(losses))
        columns.append(column)
    names = [n for n in (*CLOSED_FORMS, YARN_LADDER, FOUND) if any(n in c for c in columns)]
    rows = [
        [label(name).replace("yarn", "YaRN"), *(column.get(name) for column in columns)]
        for name in names
    ]
    if not any(value is not None for row in rows for value in row[1:]):
        return []
    head = [f"perplexity of a tier's range, {WINDOWS[role]}", *(f"to {end}" for end in ends)]
    return [Table(head, rows, best=-1, digits=3)]


def _convergence(run: Search) -> list[Section]:
    """Return the plots of how the search went; none where nothing was measured."""
    drawn = convergence(run, "search")
    if drawn is None:
        return []
    words = "Each point is a candidate on the same windows."
    if any(entry["role"] in ("gradient", "screen") for entry in run.entries):
        words += (
            " Candidates on the first windows and steps of the descent, which go by other "
            "windows, are not shown."
        )
    return [Section("Convergence", [words], [drawn])]


def convergence(run: Search, name: str, title: str = "") -> Figure | None:
    """Return the plot of how the search went, a panel for each tier."""
    tiers = [None]
    if run.ladder:
        tiers = list(range(1, len(run.ladder["targets"]) + 1))
    tiers = [t for t in tiers if any(math.isfinite(v) for _, v in run.measured(t))]
    if not tiers:
        return None

    def panel(number: int, axes: Any) -> None:
        tier = tiers[number]
        reached = run.reached(tier, "search")
        levels = {n: v for n, v in reached.items() if n in run.drawn(tier)}
        if run.loaded.get("search") is not None and tier is None:
            levels["none"] = run.loaded["search"]
        plots.draw_convergence(axes, run.measured(tier), levels)
        if tier is not None:
            text = f"tier to {figures.short(run.ladder['targets'][tier - 1])} tokens"
            above = axes.get_title(loc="left")
            axes.set_title(f"{text}\n{above}" if above else text)

    def draw(figure: Any) -> None:
        figures.panels(figure, len(tiers), panel)
        figures.legend(figure)

    caption = f"{title}Perplexity of candidates on the search windows, and the best so far."
    return Figure(name, caption, draw, figures.panels_size(len(tiers)))


def _factors(run: Search) -> list[Section]:
    """Return lambda by dimension, beside the rules and for every tier."""
    if run.factors is None:
        return []
    section = Section("Rescale factors", [
        "Lambda 1 leaves a pair of dimensions as it was trained; the ratio of the windows "
        "slows it down as far as PI does."
    ])  # fmt: skip
    lengths = {
        name: run.problem[name]
        for name in ("original_length", "target_length", "rope_theta", "rotary_dim")
    }
    stage = np.ones(len(run.factors.lambdas.T)) if run.stage is None else run.stage
    sets = [(line("none", label="as loaded"), stage)]
    for name in run.drawn(run.last_tier):
        if name in RULES:
            sets.append((line(name), getattr(RescaleFactors, name)(**lengths).lambdas))
            continue
        entry = next(e for e in run.of(run.last_tier) if e.get("origin") == name)
        sets.append((line(name), run.lambdas(entry)))
    sets.append((line("gradient", label=FOUND), run.factors.lambdas))
    section.figures.append(lambda_figure("factors", sets))
    if run.tiers is not None and len(run.tiers) > 1:
        section.figures.append(tier_figure("tiers", run.tiers))
    if run.factors.per_head:
        section.figures.append(head_figure("heads", run.factors))
    return [section]


def rows(run: Search) -> list[Row]:
    """Return the lines of `results.csv`."""
    target = run.problem["target_length"]
    rows = [
        Row(f"perplexity, {WINDOWS[role]}", label(name), 0, target, value)
        for name, by_role in run.by_set().items()
        for role, value in by_role.items()
        if not run.ladder
    ]
    for tier in [None] if not run.ladder else range(1, len(run.ladder["targets"]) + 1):
        name = FOUND if tier is None else f"tier {tier}"
        rows += [
            Row("perplexity, search windows", f"candidate of {name}", None, number, value)
            for number, value in run.measured(tier)
        ]
    if run.tiers is not None:
        return rows + tier_rows(run.tiers)
    return rows if run.factors is None else rows + factor_rows(FOUND, run.factors.lambdas)
