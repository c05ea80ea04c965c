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
from longrope.runs.journal import Journal, is_begun

CONFIG, JOURNAL, FACTORS = "config.json", "journal.jsonl", "factors.json"
HISTORY, PLOT = "history.csv", "search.png"

_STYLE = {"pi": ("PI", "#d95f02"), "ntk": ("NTK", "#c79a00"), "yarn": ("YaRN", "#1b7fbd")}
_OURS = "#c2185b"


def prepare(out: str | Path, resume: bool = True) -> Path:
    """Create the folder of a search and try to write in it.

    A folder that holds files of these names and no journal is somebody else's (a model has a
    `config.json` too) and is refused, and so is a journal that no search has begun. With
    `resume=False` the files of an earlier search go to a folder `previous-1`, `previous-2` and so
    on.

    Raises `ValueError` with one sentence.
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
    begun = is_begun(out / JOURNAL)
    others = [name for name in (CONFIG, FACTORS, HISTORY, PLOT) if (out / name).exists()]
    if others and not begun:
        raise ValueError(
            f"out: expected a new folder or one of a search, got {str(out)!r}, which holds "
            f"{others[0]} and no journal of a search"
        )
    if begun and not resume:
        with Journal.locked(out / JOURNAL):
            aside = next(p for n in itertools.count(1) if not (p := out / f"previous-{n}").exists())
            aside.mkdir()
            for name in (*others, JOURNAL):  # the journal last: a kill in between loses nothing
                os.replace(out / name, aside / name)
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


def summary(out: Path) -> dict[str, Any]:
    """Return what a folder holds, in words: how the search was asked for and how far it is.

    Raises `ValueError` where its journal is none.
    """
    if not is_begun(out / JOURNAL):
        raise ValueError(f"{str(out / JOURNAL)!r}: expected the journal of a search that has begun")
    lines = (out / JOURNAL).read_bytes().split(b"\n")[:-1]
    header, *entries = (json.loads(line) for line in lines)
    problem = header["problem"]
    steps = sum(entry["role"] == "gradient" for entry in entries)
    facts = {
        "search": header["method"],
        "objective": header["objective"],
        "original length": problem["original_length"],
        "target length": problem["target_length"],
        "seed": header["seed"],
        "measured": f"{len(entries) - steps} candidates on windows, {steps} steps",
        "state": "finished"
        if (out / FACTORS).exists()
        else "not finished; the same command resumes",
    }
    for role, name in (("search", "search windows"), ("validation", "held-out windows")):
        found = [e for e in entries if e["role"] == role and e["nll"] is not None]
        if found:
            best = min(found, key=lambda e: e["nll"])
            yarn = [e["nll"] for e in found if e["origin"] == "yarn"]
            beside = f", {math.exp(yarn[0]):.4f} with YaRN" if yarn else ""
            facts[f"best on the {name}"] = f"perplexity {math.exp(best['nll']):.4f}{beside}"
    return facts


def plot(
    path: Path,
    factors: RescaleFactors,
    history: Sequence[Evaluation],
    baselines: Mapping[str, RescaleFactors],
) -> None:
    """Plot the convergence, and lambda by dimension against the factors that need no search.

    The legend has perplexities on the search windows and, where there are any, on those held out.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_convergence(left, history)
    for name, baseline in baselines.items():
        label, color = _STYLE[name]
        label += _reached([e for e in history if e.origin == name])
        right.plot(baseline.lambdas, color=color, label=label, linewidth=1.2)
    chosen = (tuple(factors.lambdas.tolist()), factors.start_tokens, factors.attention_factor)
    label = "searched" + _reached(
        [e for e in history if (e.lambdas, e.start_tokens, e.attention_factor) == chosen]
    )
    right.plot(factors.lambdas, "o-", color=_OURS, markersize=3, label=label)
    right.set(
        xlabel="pair of dimensions i",
        ylabel="rescale factor $\\lambda_i$",
        title=f"$\\hat n$ = {factors.start_tokens} start tokens, "
        f"attention factor {factors.attention_factor:.3f}",
    )
    right.legend(frameon=False, title="perplexity: search, held out")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)


def _plot_convergence(axes: Any, history: Sequence[Evaluation]) -> None:
    searched = [(n, e) for n, e in enumerate(history, 1) if e.role == "search"]
    at, values = [n for n, _ in searched], [e.perplexity for _, e in searched]
    reached = {e.origin: e.perplexity for _, e in searched if e.origin in _STYLE}
    # Failures can be orders of magnitude worse: show the range in which the search works.
    lowest, good = min(values), sorted(values)[len(values) * 3 // 4]
    top = max(good, 1.1 * min(reached.values(), default=0))
    axes.plot(at, values, ".", color="0.6", markersize=4, label="candidates")
    best = [b if b <= top else math.nan for b in itertools.accumulate(values, min)]
    axes.plot(at, best, color=_OURS, linewidth=2.5, label="best", drawstyle="steps-post")
    for n, (name, value) in enumerate(reached.items()):
        if value <= top:
            label, color = _STYLE[name]
            axes.axhline(value, color=color, linestyle=":", linewidth=1)
            # Side by side, since two of them can be alike.
            axes.annotate(label, (0.4 + 0.12 * n, value), xycoords=("axes fraction", "data"),
                          color=color, xytext=(0, 3), textcoords="offset points")  # fmt: skip
    if lowest < top < math.inf:
        axes.set_ylim(lowest - 0.05 * (top - lowest), top)
    axes.set(
        xlabel="evaluations and steps", ylabel="perplexity on the search windows",
        xlim=(0, len(history) + 1),
    )  # fmt: skip
    axes.legend(frameon=False, loc="upper right")


def _reached(evaluations: Sequence[Evaluation]) -> str:
    """Return the perplexities of a candidate for a legend, `: 9.93, 13.08`."""
    by_role = {e.role: f"{e.perplexity:.2f}" for e in evaluations}
    known = [by_role[role] for role in ("search", "validation") if role in by_role]
    return ": " + ", ".join(known) if known else ""


def _write(path: Path, text: str) -> None:
    """Replace the file as a whole: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
