"""How every plot of the project is drawn: sizes, fonts, axes, legends and what stands on them.

One column of a paper wide, so that two stand side by side on a page and one on a phone. A legend
stands below its axes, never on a curve; the axes are those of the data, and what is far beyond them
is written above instead of pressing all other curves together; a curve on top of another lets it
through.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longrope._files import replacing
from longrope.runs.style import MUTED, OURS, STYLES, Style

#: Width and height of a figure of one panel, inches.
SIZE = (4.8, 3.3)
_RC = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "pdf.fonttype": 42,  # text that can be searched and edited, not shapes
}
_DPI = 200
#: Values above this many times the third quartile are written above the axes.
_FAR = 1.5
#: A level up to so many times the range of the candidates is drawn with them.
_NEAR = 3.5
#: Curves no further apart than this share of their axis are one on top of the other.
_COINCIDENT = 0.008
#: Points of a curve that all carry a marker.
_MARKED = 12
#: What stands side by side in a legend as wide as a figure of one panel.
_CHARACTERS = 66
#: Axes whose ends are further apart than this ratio are logarithmic.
_LOGARITHMIC = 6.0


class Curve(NamedTuple):
    """A curve: how it is drawn, and its points; `low` and `high` are the ends of intervals."""

    look: Mapping[str, Any]
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@contextlib.contextmanager
def canvas(*paths: Path, size: tuple[float, float] = SIZE, dpi: int = _DPI) -> Iterator[Any]:
    """Make a `matplotlib.figure.Figure`, and write it to files at the end of the `with` block.

    The kind of a file is its ending: PNG, PDF or SVG. The same figure gives the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        for path in paths:
            kind = path.suffix.removeprefix(".").lower()
            undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
            with replacing(path) as file:
                figure.savefig(file, format=kind, dpi=dpi, metadata=undated)


def draw_curves(
    axes: Any, curves: Sequence[Curve], *, log_y: bool | None = None, far: bool = True
) -> None:
    """Draw curves of values above 0, and set the ends of the axis by them.

    With `far`, values far above most are written over the axes, in the curve's colour. `log_y`
    None: where the values ask for it.
    """
    every = [v for curve in curves for v in curve.y if math.isfinite(v)]
    top = _top(every) if far else max(every, default=math.inf)
    inside = [v for v in every if v <= top]
    ends = [v for c in curves for v in (*c.low, *c.high) if v is not None and v <= top]
    low, high = min(inside, default=0.0), max(inside, default=1.0)
    log = log_y if log_y is not None else low > 0 and high / low > _LOGARITHMIC
    _scale(axes, min([low, *ends]), max([high, *ends]), log)
    for number, curve in enumerate(curves):
        look, count = dict(curve.look), len(curve.x)
        under = [other for other in curves[:number] if _coincide(curve, other, high - low)]
        if under:  # dashes let the curve below through, and its markers stand in the gaps
            look |= {"linestyle": (0, (2.5, 2.5)), "markersize": 1.4 * look["markersize"],
                     "markerfacecolor": "none"}  # fmt: skip
        if count > _MARKED:
            every = -(-count // _MARKED)
            look["markevery"] = (number % every, every)
        axes.plot(curve.x, [v if math.isfinite(v) else math.nan for v in curve.y], **look)
        spans = [
            (x, a, b)
            for x, a, b in zip(curve.x, curve.low, curve.high, strict=False)
            if a is not None and b is not None
        ]
        if spans:
            axes.vlines(*zip(*spans, strict=True), color=look["color"], alpha=0.45, linewidth=2.5)
    if far:
        beyond = [(c, [(x, y) for x, y in zip(c.x, c.y, strict=True) if y > top]) for c in curves]
        _write_far(axes, [pair for pair in beyond if pair[1]])


def _top(values: Sequence[float]) -> float:
    """Return what the axis ends at: the greatest value that is not far above most."""
    finite = sorted(v for v in values if math.isfinite(v))
    if not finite:
        return math.inf
    quartile = finite[(3 * len(finite) - 1) // 4 if len(finite) > 3 else -1]
    return max(v for v in finite if v <= _FAR * quartile or v <= finite[0] * _FAR)


def _write_far(axes: Any, far: Sequence[tuple[Curve, list[tuple[float, float]]]]) -> None:
    """Write values beyond the axes above them, a row for each curve."""
    for row, (curve, points) in enumerate(reversed(far)):
        for x, y in points:
            axes.annotate(
                f"↑{y:.3g}" if math.isfinite(y) else "↑∞",
                (x, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3 + 9 * row),
                textcoords="offset points", ha="center", fontsize=7.5, color=curve.look["color"],
            )  # fmt: skip


def _coincide(one: Curve, other: Curve, height: float) -> bool:
    """Say whether two curves lie on one another in most of their points."""
    if list(one.x) != list(other.x) or not len(one.x):
        return False
    apart = np.abs(np.array(one.y, float) - np.array(other.y, float))
    return bool(np.mean(apart <= _COINCIDENT * height) >= 0.5)


def _scale(axes: Any, low: float, high: float, log: bool) -> None:
    """Let the axis of values begin and end a little beyond these."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if not log:
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
        return
    axes.set_yscale("log")
    axes.set_ylim(low / 1.06, high * 1.06)
    marks = [m * 10.0**e for e in range(-6, 9) for m in (1, 1.5, 2, 3, 4, 6, 8)]
    axes.set_yticks([m for m in marks if low / 1.06 <= m <= high * 1.06])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def lengths_axis(axes: Any, lengths: Sequence[int], label: str) -> None:
    """Make the x axis one of lengths: logarithmic, a tick for each."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([short(length) for length in lengths])
    axes.set_xlabel(label)
    axes.margins(x=0.06)


def short(length: int) -> str:
    """Return a length as an axis has it: 2048, 16k, 2M."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if length >= 8 * 2**10 and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def legend(figure: Any, columns: int = 3) -> None:
    """Put one legend below the axes of a figure, each label once; the figure grows by its rows."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        longest = max(map(len, entries))
        width, height = figure.get_size_inches()
        room = int(_CHARACTERS * width / SIZE[0])
        columns = max(1, min(columns, len(entries), room // (longest + 6)))
        more = -(-len(entries) // columns) - 1  # the first row has its room in the size
        figure.set_size_inches(width, height + 0.19 * more)
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)


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
    _scale(axes, lowest, top, log=False)
    room = max(0.02 * (at[-1] - at[0]), 0.5)
    axes.set_xlim(at[0] - room, at[-1] + room)
    axes.set(xlabel="evaluation of the search", ylabel="perplexity, search windows")
    _label_levels(axes, near)
    missing = {name: v for name, v in baselines.items() if name not in near}
    above = [f"{_style(name).label} {v:.3g}" for name, v in missing.items()]
    others = sum(not v <= top for v in values) - sum(v in values for v in missing.values())
    above += [f"{others} candidate{'s' * (others > 1)}"] if others > 0 else []
    if above:
        axes.set_title(f"above: {', '.join(above)}", fontsize=8, color="0.35")


def _style(name: str) -> Style:
    return STYLES[name]._replace(label="as loaded") if name == "none" else STYLES[name]


def _label_levels(axes: Any, levels: Mapping[str, float]) -> None:
    """Draw horizontal lines, with names on the right of the axes that keep apart."""
    low, high = axes.get_ylim()
    last = -math.inf
    for name, value in sorted(levels.items(), key=lambda item: item[1]):
        style = _style(name)
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
    _scale(axes, min(every), max(every), log=False)
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


def panels_size(count: int) -> tuple[float, float]:
    """Return the size of a figure of so many panels of curves, two in a row."""
    return SIZE if count == 1 else (7.2, 2.9 * -(-count // 2) + 0.3)


def map_size(sets: int, lengths: int) -> tuple[float, float]:
    """Return the size of a figure of so many maps, side by side two in a row."""
    columns = min(2, sets)
    return max(SIZE[0], columns * (1.0 + 0.45 * lengths)), 2.9 * -(-sets // columns)


def panels(figure: Any, count: int, draw: Callable[[int, Any], None], columns: int = 2) -> None:
    """Draw panels, so many side by side; those that a row has left are empty."""
    columns = min(columns, count)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False).flatten()
    for number, axes in enumerate(grid):
        if number < count:
            draw(number, axes)
        else:
            axes.set_visible(False)
