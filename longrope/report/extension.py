"""The report of `longrope.extend`: perplexity by position after each stage, factors, losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope._numbers import from_json
from longrope.factors import Tiers
from longrope.factors.heads import span
from longrope.factors.tiers import ladder_targets
from longrope.report import figures, plots, search
from longrope.report.page import Command, Figure, Page, Row, Section, Table, number, read_csv
from longrope.report.parts import (
    factor_rows,
    flat,
    json_object,
    refer,
    tier_figure,
    tier_rows,
)
from longrope.report.search_data import KIND as KIND_OF_SEARCH
from longrope.report.search_data import Search
from longrope.runs import journal
from longrope.runs.folder import JOURNAL
from longrope.runs.style import line

KIND = "context extension"
#: What a run leaves; of a stage of fine-tuning the loss of every step.
STAGES, TIERS, LOSSES, BASELINES = "stages", "tiers.json", "losses.csv", "baselines.json"
#: The name of the last entry of a journal.
EXPORT = "export"
#: How the rows of the table are drawn, in order; the model as it was comes first.
_LOOKS = ("none", "gradient", "evolution", "hybrid", "position", "cope", "mrrope-pro", "llama3")


def page(out: Path, shown: str) -> Page:
    """Return the report of a run of `longrope.extend`, finished or not."""
    header, entries = journal.read(out / JOURNAL)
    plan = header["plan"]
    window, target, stages = plan["window"], plan["target_length"], plan["stages"]
    rows = [_row(entry["row"]) for entry in entries if "row" in entry]
    done = {entry.get("stage") for entry in entries}
    baselines = json_object(out / BASELINES) if (out / BASELINES).is_file() else {}
    baselines = {name: _row(row) for name, row in baselines.items()}
    found = Page(
        title=f"From {window} to {target} tokens",
        lead=f"An extension in {len(stages)} stages, measured after each on text that none sees.",
        finished=EXPORT in done,
        settings=_settings(plan),
    )
    ends = _ends(window, target)
    found.sections.append(_perplexity(rows, list(baselines.values()), ends, found.finished))
    if rows:
        found.facts.append(("perplexity before", _figure(rows[0]["overall"])))
    if len(rows) > 1:
        found.facts.append((f"after {rows[-1]['name'].partition(':')[0]}",
                            _figure(rows[-1]["overall"])))  # fmt: skip
    for row in baselines.values():
        found.facts.append((f"with {row['name']}", _figure(row["overall"])))
    for row in (*rows, *baselines.values()):
        begins = [0, *ends[:-1]]
        parts = zip(begins, ends, row["by_range"], strict=False)
        found.rows += [Row("perplexity", row["name"], a, b, value) for a, b, value in parts]
        found.rows.append(Row("perplexity", row["name"], 0, target, row["overall"]))
    folders = {name: out / STAGES / f"{s['number']:02}-{name}" for name, s in stages.items()}
    found.sections += _losses(folders, found)
    found.sections += _factors(out, folders, done, found)
    found.sections += _searches(folders)
    found.sections.append(_stages(stages, done, folders, out, shown))
    return found


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of perplexities as the journal keeps it, infinite ones as numbers."""
    return {key: from_json(value) for key, value in row.items()}


def _settings(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the seed and what each stage was asked to do."""
    rows = flat({"seed": plan["seed"]})
    for name, stage in plan["stages"].items():
        own = {k: v for k, v in stage.items() if k not in ("number", "name", "options", "config")}
        own |= stage.get("options") or stage.get("config") or {}
        rows += flat(own, f"{name}: ")
    return rows


def _ends(window: int, target: int) -> list[int]:
    return [window, *ladder_targets(window, target)]


def _perplexity(
    rows: list[Mapping[str, Any]], rules: list[Mapping[str, Any]], ends: list[int], finished: bool
) -> Section:
    section = Section("Perplexity by position, before and after")
    if not rows:
        section.paragraphs.append("Nothing was measured yet.")
        return section
    section.paragraphs.append(
        "Windows of the target length on held-out text: how well a token is predicted, by how far "
        "into the window it stands."
    )
    if not rules and not finished:
        section.paragraphs.append("PI, NTK and YaRN are measured beside it at the end of the run.")
    looks = [line(_LOOKS[min(n, len(_LOOKS) - 1)], label=row["name"].partition(":")[0])
             for n, row in enumerate(rows)]  # fmt: skip
    looks += [line(row["style"], label=row["name"]) for row in rules]
    curves = [
        figures.Curve(look, ends, [math.nan if v is None else v for v in row["by_range"]])
        for look, row in zip(looks, (*rows, *rules), strict=True)
        if len(row["by_range"]) == len(ends)
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        figures.draw_curves(axes, curves)
        figures.lengths_axis(axes, ends, "position in the window, up to")
        axes.set_ylabel("perplexity, held-out text")
        figures.legend(figure)

    section.figures.append(
        Figure("perplexity", "Perplexity by position in the window.", draw, figures.SIZE)
    )
    begins = [0, *ends[:-1]]
    head = ["", *(f"{a} to {b - 1}" for a, b in zip(begins, ends, strict=True)), "all"]
    cells = [[row["name"], *row["by_range"], row["overall"]] for row in (*rows, *rules)]
    cells = [row for row in cells if len(row) == len(head)]
    section.tables.append(Table(head, cells, "Perplexity by range of positions.", -1, 3))
    return section


def _losses(folders: Mapping[str, Path], found: Page) -> list[Section]:
    stages = []
    for name, place in folders.items():
        steps, losses = losses_of(place)
        if steps:
            stages.append((name, steps, losses))
            found.rows += [
                Row("loss", name, None, step, loss)
                for step, loss in zip(steps, losses, strict=True)
            ]
    if not stages:
        return []

    def draw(figure: Any) -> None:
        plots.draw_losses(figure.subplots(), stages)
        figures.legend(figure)

    figure = Figure("losses", "Loss of fine-tuning, by step.", draw, figures.SIZE)
    return [Section("Fine-tuning", figures=[figure])]


def losses_of(stage: Path) -> tuple[list[float], list[float]]:
    """Return the steps and losses of a stage: when it is done, or up to its last checkpoint."""
    path = stage / LOSSES
    if path.is_file():
        rows = read_csv(path, ("step", "loss"))
        pairs = [(number(path, "step", r["step"]), number(path, "loss", r["loss"])) for r in rows]
    else:
        states = [
            state
            for state in stage.glob("checkpoint-*/trainer_state.json")
            if state.parent.name.removeprefix("checkpoint-").isdigit()
        ]
        states.sort(key=lambda state: int(state.parent.name.removeprefix("checkpoint-")))
        pairs = []
        for state in reversed(states):
            try:
                history = json_object(state)["log_history"]
                pairs = [(float(e["step"]), float(e["loss"])) for e in history if "loss" in e]
                break
            except (ValueError, KeyError, TypeError):  # a checkpoint that a kill cut off
                continue
    return [step for step, _ in pairs], [loss for _, loss in pairs]


def _factors(out: Path, folders: Mapping[str, Path], done: set[Any], found: Page) -> list[Section]:
    files = [out / TIERS, *(folders[name] / TIERS for name in reversed(folders) if name in done)]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return []
    tiers = Tiers.load(path)
    if len(tiers) > 1:
        found.rows += tier_rows(tiers)
    else:
        found.rows += factor_rows(f"up to {tiers[-1].target_length}", tiers[-1].lambdas)
    found.facts.append(("tiers by position", str(len(tiers))))
    attention = [
        [f"up to {t.target_length}", span(t.attention_factor), str(t.start_tokens)] for t in tiers
    ]
    table = Table(["tier", "attention factor", "start tokens"], attention)
    words = "The token at a position takes the first tier that reaches it."
    return [Section("Rescale factors", [words], [tier_figure("tiers", tiers)], [table])]


def _searches(folders: Mapping[str, Path]) -> list[Section]:
    section = Section("Convergence of the searches")
    for name, place in folders.items():
        if journal.kind_of(place / "search" / JOURNAL) != KIND_OF_SEARCH:
            continue
        run = Search.read(place / "search")
        drawn = search.convergence(run, f"convergence-{place.name}", f"{name}: ")
        if drawn is not None:
            section.figures.append(drawn)
    return [section] if section.figures else []


def _stages(
    stages: Mapping[str, Any], done: set[Any], folders: Mapping[str, Path], out: Path, shown: str
) -> Section:
    rows = []
    for name, stage in stages.items():
        length = stage.get("length") or ", ".join(map(str, stage.get("lengths", ())))
        begun = folders[name].is_dir()
        state = "done" if name in done else "begun" if begun else "to be done"
        rows.append([name, stage["kind"], str(length), state])
    section = Section("Stages", tables=[Table(["stage", "kind", "tokens", "state"], rows)])
    for name, place in folders.items():
        if (place / "search" / JOURNAL).is_file():
            inner = (place / "search").relative_to(out).as_posix()
            refer(section, out, inner, shown, f"{name} in detail")
    target = max(max(_lengths(stage)) for stage in stages.values()) if stages else 0
    if EXPORT in done:
        section.commands.append(
            Command(
                f"longrope evaluate {shown}/model UNSEEN --lengths {target} "
                f"--tasks perplexity,passkey,ruler --out {shown}/evaluation",
                "passkey, RULER and the perplexity of other text; then report again",
            )
        )
    return section


def _lengths(stage: Mapping[str, Any]) -> list[int]:
    return [stage["length"]] if "length" in stage else list(stage["lengths"])


def _figure(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"
