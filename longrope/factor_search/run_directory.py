"""The folder of a search: `config.json`, `journal.jsonl`, `factors.json`, `history.csv`, PNG."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope.factor_search.history import Evaluation
from longrope.factors import RescaleFactors

CONFIG, JOURNAL, FACTORS = "config.json", "journal.jsonl", "factors.json"
HISTORY, PLOT = "history.csv", "search.png"

_STYLE = {"pi": ("PI", "#d95f02"), "ntk": ("NTK", "#c79a00"), "yarn": ("YaRN", "#1b7fbd")}
_OURS = "#c2185b"


def prepare(out: str | Path) -> Path:
    """Create the folder and try to write in it; `ValueError` with one sentence if that fails."""
    out = Path(out)
    trial = out / f".writable-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write to {str(out)!r} ({error.strerror})") from None
    return out


def write_config(out: Path, config: Mapping[str, Any]) -> None:
    """Write what the run was asked to do, for people; the journal's header is what binds."""
    _write(out / CONFIG, json.dumps(config, indent=2, default=str) + "\n")


def write_results(
    out: Path,
    factors: RescaleFactors,
    history: Sequence[Evaluation],
    baselines: Mapping[str, RescaleFactors],
) -> None:
    """Write the factors, the history as a table, and the plot."""
    factors.save(out / FACTORS)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    names = [f"lambda_{i}" for i in range(len(history[0].lambdas))]
    writer.writerow(
        [
            "evaluation",
            "role",
            "iteration",
            "origin",
            "perplexity",
            "start_tokens",
            "attention_factor",
            *names,
        ]
    )
    for number, e in enumerate(history):
        row = [number, e.role, e.iteration, e.origin, repr(e.perplexity), e.start_tokens]
        writer.writerow([*row, e.attention_factor, *e.lambdas])
    _write(out / HISTORY, table.getvalue())
    plot(out / PLOT, factors, history, baselines)


def plot(
    path: Path,
    factors: RescaleFactors,
    history: Sequence[Evaluation],
    baselines: Mapping[str, RescaleFactors],
) -> None:
    """Plot the convergence, and lambda by dimension against the factors that need no search."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    searched = [(n, e) for n, e in enumerate(history) if e.role == "search"]
    values = [e.perplexity for _, e in searched]
    reached = {e.origin: e.perplexity for _, e in searched if e.origin in _STYLE}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)

    at = [n for n, _ in searched]
    left.plot(at, values, ".", color="0.7", markersize=4, label="candidate")
    best = list(itertools.accumulate(values, min))
    left.plot(at, best, color=_OURS, linewidth=2.5, label="best", drawstyle="steps-post")
    # Failures can be orders of magnitude worse: show the range in which the search works.
    lowest, good = min(values), sorted(values)[len(values) * 3 // 4]
    top = max(good, 1.1 * min(reached.values(), default=0))
    for name, value in reached.items():
        if value <= top:
            label, color = _STYLE[name]
            left.axhline(value, color=color, linestyle=":", linewidth=1)
            left.annotate(label, (0.5, value), xycoords=("axes fraction", "data"), color=color,
                          xytext=(0, 3), textcoords="offset points")  # fmt: skip
    if lowest < top < math.inf:
        left.set_ylim(lowest - 0.05 * (top - lowest), top)
    left.set(xlabel="evaluations and steps", ylabel="perplexity on the search windows")
    left.legend(frameon=False, loc="upper right")

    for name, baseline in baselines.items():
        label, color = _STYLE[name]
        if name in reached:
            label += f", {reached[name]:.2f}"
        right.plot(baseline.lambdas, color=color, label=label, linewidth=1.2)
    chosen = (tuple(factors.lambdas.tolist()), factors.start_tokens)
    found = next((e for _, e in searched if (e.lambdas, e.start_tokens) == chosen), None)
    label = f"searched, {found.perplexity:.2f}" if found else "searched"
    right.plot(factors.lambdas, "o-", color=_OURS, markersize=3, label=label)
    right.set(
        xlabel="pair of dimensions i",
        ylabel="rescale factor $\\lambda_i$",
        title=f"$\\hat n$ = {factors.start_tokens} start tokens",
    )
    right.legend(frameon=False, title="factors, perplexity")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    """Replace the file as a whole: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
