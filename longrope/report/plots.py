"""What plots of runs show: factors, convergence, losses of fine-tuning, maps of passkey trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longrope.report.figures import SIZE, Curve, draw_curves, panels, scale, short
from longrope.runs.style import MUTED, OURS, STYLES, Style

#: A level up to so many times the range of the candidates is drawn with them.
_NEAR = 3.5


def draw_factors(axes: Any, sets: Sequence[tuple[Mapping[str, Any], np.ndarray]]) -> None:
    """Draw lambda by pair of dimensions, for each set of factors.

    float64 `[R/2]`; of factors by layer or head, `[..., R/2]`, the median within what they span.
    """
    curves = []
    for look, lambdas in sets:
        each = np.asarray(lambdas, float).reshape(-1, np.shape(lambdas)[-1])
        finite = np.where(np.isfinite(each), each, np.nan)
        middle = np.nanmedian(finite, 0) if len(finite) > 1 else finite[0]
        curves.append(Curve(look, range(each.shape[1]), middle.tolist()))
        if len(each) > 1:
            axes.fill_between(
                range(each.shape[1]), np.nanmin(finite, 0), np.nanmax(finite, 0),
                color=look["color"], alpha=0.18, linewidth=0,
            )  # fmt: skip
    draw_curves(axes, curves, far=False)
    axes.set(xlabel="pair of dimensions $i$", ylabel="rescale factor $\\lambda_i$")


def tier_looks(ends: Sequence[int]) -> list[dict[str, Any]]:
    """Return how the curve of each tier is drawn: from dark to light, with markers."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = colormaps["cividis"](np.linspace(0.0, 0.75, len(ends)))
    markers = "osD^vP*Xhp<>"
    return [
        {"label": f"up to {short(end)}", "color": to_hex(shade), "marker": markers[n % 12],
         "markersize": 4, "linewidth": 1.6}
        for n, (end, shade) in enumerate(zip(ends, shades, strict=True))
    ]  # fmt: skip


def draw_convergence(
    axes: Any,
    measured: Sequence[tuple[float, float]],
    baselines: Mapping[str, float],
) -> None:
    """Draw candidates on the same windows, `(number, perplexity)`, and the best so far.

    `baselines` are perplexities by the name of a style. The axes begin and end where the search
    works; candidates beyond are counted.
    """
    at = [n for n, _ in measured]
    values = [v for _, v in measured]
    best = np.minimum.accumulate(values).tolist()
    finite = sorted(v for v in values if math.isfinite(v))
    if not finite:
        return
    # Failures can be orders of magnitude worse than what the search works on.
    top = max(finite[(3 * len(finite) - 1) // 4], best[0] if best[0] <= 1.5 * best[-1] else 0)
    lowest = finite[0]
    reach = lowest + _NEAR * max(top - lowest, 0.01 * lowest)
    near = {name: v for name, v in baselines.items() if v <= reach}
    top = max([top, *near.values()])
    axes.plot(at, values, "o", color=MUTED, markersize=3.5, label="candidates")
    axes.plot(at, [b if b <= top else math.nan for b in best], color=OURS, linewidth=2.2,
              label="best so far", drawstyle="steps-post")  # fmt: skip
    scale(axes, lowest, top, log=False)
    room = max(0.02 * (at[-1] - at[0]), 0.5)
    axes.set_xlim(at[0] - room, at[-1] + room)
    axes.set(xlabel="evaluation of the search", ylabel="perplexity, search windows")
    _label_levels(axes, near)
    missing = {name: v for name, v in baselines.items() if name not in near}
    above = [f"{look_of(name).label} {v:.3g}" for name, v in missing.items()]
    others = sum(not v <= top for v in values) - sum(v in values for v in missing.values())
    above += [f"{others} candidate{'s' * (others > 1)}"] if others > 0 else []
    if above:
        axes.set_title(f"above: {', '.join(above)}", fontsize=8, color="0.35")


def look_of(name: str) -> Style:
    """Return how a method is drawn and called: without factors, "as loaded"."""
    return STYLES[name]._replace(label="as loaded") if name == "none" else STYLES[name]


def _label_levels(axes: Any, levels: Mapping[str, float]) -> None:
    """Draw horizontal lines, with names on the right of the axes that keep apart."""
    low, high = axes.get_ylim()
    last = -math.inf
    for name, value in sorted(levels.items(), key=lambda item: item[1]):
        style = look_of(name)
        axes.axhline(value, color=style.color, linestyle=":", linewidth=style.linewidth)
        last = max(value, last + 0.06 * (high - low))
        axes.annotate(style.label, (1.01, last), xycoords=("axes fraction", "data"), va="center",
                      color=style.color, fontsize=8.5, annotation_clip=False)  # fmt: skip


def draw_losses(axes: Any, stages: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> None:
    """Draw the loss of stages of fine-tuning, `(name, steps, losses)`, one after the other."""
    before = 0.0
    every = [v for _, _, losses in stages for v in losses if math.isfinite(v)]
    if not every:
        return
    scale(axes, min(every), max(every), log=False)
    for number, (name, steps, losses) in enumerate(stages):
        at = [before + step for step in steps]
        axes.plot(at, losses, color=MUTED, linewidth=1, marker=".", markersize=3,
                  label="each step")  # fmt: skip
        half = max(1, len(losses) // 24)
        kernel = np.ones(2 * half + 1)
        counts = np.convolve(np.ones(len(losses)), kernel)[half : half + len(losses)]
        smooth = np.convolve(losses, kernel)[half : half + len(losses)] / counts
        axes.plot(at, smooth, color=OURS, linewidth=2, label=f"mean of {2 * half + 1} steps")
        axes.annotate(name, (at[0], 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                      textcoords="offset points", fontsize=8.5)  # fmt: skip
        if number:
            axes.axvline(before + 0.5, color="0.5", linewidth=0.8, linestyle=":")
        before = at[-1] if at else before
    axes.set(xlabel="step", ylabel="loss, nats per token")


def draw_map(axes: Any, shares: np.ndarray, lengths: Sequence[int], title: str) -> None:
    """Draw shares of right trials, float64 `[bands of depth, lengths]`, NaN where there are none.

    From dark to light, which everybody sees and a printer without colours prints; with numbers.
    """
    from matplotlib import colormaps

    bands = len(shares)
    colors = colormaps["cividis"].with_extremes(bad="white")
    axes.grid(False)
    axes.imshow(shares, vmin=0, vmax=1, cmap=colors, aspect="auto", interpolation="nearest")
    for row, column in np.ndindex(shares.shape):
        value = shares[row, column]
        text, color = ("-", "0.4") if math.isnan(value) else (
            f"{100 * value:.0f}", "white" if value < 0.5 else "black"
        )  # fmt: skip
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7.5)
    axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
    step = 2 if bands % 2 == 0 else 1
    ends = np.arange(0, bands + 1, step)
    axes.set_yticks(ends - 0.5, [f"{end / bands:.0%}" for end in ends])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlabel="prompt, tokens", ylabel="depth of the key", title=title)


def _map_columns(sets: int) -> int:
    return min(sets, 2 if sets <= 4 else 3)


def map_size(sets: int, lengths: int) -> tuple[float, float]:
    """Return the size of a figure of the maps of so many sets, of so many lengths each."""
    columns = _map_columns(sets)
    return max(SIZE[0], 0.6 + columns * (0.6 + 0.42 * lengths)), 2.8 * -(-sets // columns)


def draw_maps(figure: Any, maps: Mapping[str, tuple[np.ndarray, Sequence[int]]]) -> None:
    """Draw the maps of several sets by their names, each as `draw_map` does."""
    named, columns = list(maps.items()), _map_columns(len(maps))

    def panel(number: int, axes: Any) -> None:
        title, (shares, lengths) = named[number]
        draw_map(axes, shares, lengths, title)
        if number % columns:
            axes.set(ylabel="", yticklabels=[])

    panels(figure, len(named), panel, columns)
