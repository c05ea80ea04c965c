"""The plot of a search: how it converged, and what it found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope._files import replacing
from longrope.factor_search.history import AS_LOADED, BASELINES, Evaluation, Role
from longrope.factors import RescaleFactors
from longrope.runs.style import MUTED, OURS, STYLES, line, tidy

#: The closed forms that are always drawn; of the others only the best.
DRAWN = ("pi", "ntk", "yarn")


def plot(
    path: Path,
    factors: RescaleFactors,
    history: Sequence[Evaluation],
    baselines: Mapping[str, RescaleFactors],
    loaded: Sequence[Evaluation] = (),
) -> None:
    """Plot the convergence, and lambda by dimension beside the factors that need no search.

    The legend has perplexities on the search windows and, where there are any, on those held out.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_convergence(left, [e for e in history if e.origin != AS_LOADED], loaded)
    if loaded:
        label = "as loaded" + _reached(loaded)
        right.plot(loaded[0].lambdas, **line("none", label=label, markersize=2.5))
    for name in _drawn([e for e in history if e.role == Role.SEARCH]):
        label = STYLES[name].label + _reached([e for e in history if e.origin == name])
        right.plot(baselines[name].lambdas, **line(name, label=label, markersize=2.5))
    mean = factors.mean()
    chosen = (tuple(mean.lambdas.tolist()), mean.start_tokens, mean.attention_factor)
    label = "searched" + _reached([e for e in history if e.factors == chosen])
    right.plot(mean.lambdas, **line("gradient", label=label, markersize=3))
    if factors.per_head:
        least, most = factors.lambdas.min((0, 1)), factors.lambdas.max((0, 1))
        pairs = range(len(least))
        right.fill_between(pairs, least, most, color=OURS, alpha=0.2, label="of all heads")
    right.set(
        xlabel="pair of dimensions i",
        ylabel="rescale factor $\\lambda_i$",
        title=f"$\\hat n$ = {factors.start_tokens} start tokens, "
        f"attention factor {mean.attention_factor:.3f}",
    )
    right.legend(frameon=False, title="perplexity: search, held out")
    tidy(left, right)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")


def _plot_convergence(
    axes: Any, history: Sequence[Evaluation], loaded: Sequence[Evaluation]
) -> None:
    searched = [(n, e) for n, e in enumerate(history, 1) if e.role == Role.SEARCH]
    at, values = [n for n, _ in searched], [e.perplexity for _, e in searched]
    drawn = _drawn([e for _, e in searched])
    reached = {e.origin: e.perplexity for _, e in searched if e.origin in drawn}
    # Failures can be orders of magnitude worse: show the range in which the search works.
    lowest, good = min(values), sorted(values)[len(values) * 3 // 4]
    top = max(good, 1.1 * min(reached.values(), default=0))
    axes.plot(at, values, ".", color=MUTED, markersize=4, label="candidates")
    best = [b if b <= top else math.nan for b in itertools.accumulate(values, min)]
    axes.plot(at, best, color=OURS, linewidth=2.5, label="best", drawstyle="steps-post")
    for e in loaded[:1]:  # on the search windows
        reached["none"] = e.perplexity
    for n, (name, value) in enumerate(reached.items()):
        if value <= top:
            style = STYLES[name]._replace(label="as loaded") if name == "none" else STYLES[name]
            axes.axhline(value, color=style.color, linestyle=":", linewidth=style.linewidth)
            # Side by side, since two of them can be alike.
            axes.annotate(style.label, (0.4 + 0.12 * n, value), color=style.color,
                          xycoords=("axes fraction", "data"), xytext=(0, 3),
                          textcoords="offset points")  # fmt: skip
    if lowest < top < math.inf:
        axes.set_ylim(lowest - 0.05 * (top - lowest), top)
    axes.set(
        xlabel="evaluations and steps", ylabel="perplexity on the search windows",
        xlim=(0, len(history) + 1),
    )  # fmt: skip
    axes.legend(frameon=False, loc="upper right")


def _drawn(searched: Sequence[Evaluation]) -> list[str]:
    """Return the closed forms to draw, of what was measured on the search windows."""
    known = [e for e in searched if e.origin in BASELINES]
    best = min(known, key=lambda e: e.nll, default=None)
    return list(dict.fromkeys([*DRAWN, *([best.origin] if best else [])]))


def _reached(evaluations: Sequence[Evaluation]) -> str:
    """Return the perplexities of a candidate for a legend, `: 9.93, 13.08`."""
    by_role = {e.role: f"{e.perplexity:.2f}" for e in evaluations}
    known = [by_role[role] for role in (Role.SEARCH, Role.VALIDATION) if role in by_role]
    return ": " + ", ".join(known) if known else ""


def plot_heads(path: Path, factors: RescaleFactors) -> None:
    """Draw factors by layer and head as heat maps, relative to their mean.

    Left, a column for each head, layer after layer, and a row for each pair: log2 of the lambda
    over the mean set's. Right, by layer and head, log2 of the attention factor over the mean.
    """
    from matplotlib.figure import Figure

    mean, (layers, heads) = factors.mean(), factors.heads
    ratios = np.log2(factors.lambdas / mean.lambdas).reshape(layers * heads, -1).T
    logits = np.log2(factors.attention_factor / mean.attention_factor)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for axes, values, name in (
        (left, ratios, "log$_2$ of $\\lambda_i$ over the mean of all heads"),
        (right, logits, "log$_2$ of the attention factor over the mean"),
    ):
        most = max(float(np.abs(values).max()), 1e-6)
        image = axes.imshow(
            values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
        )
        figure.colorbar(image, ax=axes, label=name)
    for layer in range(1, layers):
        left.axvline(layer * heads - 0.5, color="black", linewidth=0.6)
    left.set(
        xlabel=f"layer ({heads} heads each)" if heads > 1 else "layer",
        ylabel="pair of dimensions i",
        xticks=[(layer + 0.5) * heads - 0.5 for layer in range(layers)],
        xticklabels=range(layers),
    )
    right.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
