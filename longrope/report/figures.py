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
    scale(axes, min([low, *ends]), max([high, *ends]), log)
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
    with np.errstate(invalid="ignore"):  # two infinite points are apart
        apart = np.abs(np.array(one.y, float) - np.array(other.y, float))
    return bool(np.mean(apart <= _COINCIDENT * height) >= 0.5)


def scale(axes: Any, low: float, high: float, log: bool) -> None:
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


def panels_size(count: int) -> tuple[float, float]:
    """Return the size of a figure of so many panels of curves, two in a row."""
    return SIZE if count == 1 else (7.2, 2.9 * -(-count // 2) + 0.3)


def panels(figure: Any, count: int, draw: Callable[[int, Any], None], columns: int = 2) -> None:
    """Draw panels, so many side by side; those that a row has left are empty."""
    columns = min(columns, count)
    grid = figure.subplots(-(-count // columns), columns, squeeze=False).flatten()
    for number, axes in enumerate(grid):
        if number < count:
            draw(number, axes)
        else:
            axes.set_visible(False)
