"""How plots look: one colour and one marker for each method, the same in every figure.

The colours are those of Okabe and Ito (2008), and then of Tol's muted scheme, which stay apart for
readers who confuse red and green. The two headline curves, YaRN and the default search, are blue
and vermilion.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Style(NamedTuple):
    """The label of a method in legends, and how its curve is drawn."""

    label: str
    color: str
    marker: str
    linewidth: float = 1.2
    linestyle: str = "-"


#: By the name of the method. The last three are searches.
STYLES = {
    "none": Style("none", "#4d4d4d", "x"),
    "pi": Style("PI", "#cc79a7", "s"),
    "ntk": Style("NTK", "#009e73", "^"),
    "dynamic-ntk": Style("dynamic NTK", "#117733", "1"),
    "yarn": Style("YaRN", "#0072b2", "D", 1.8),
    "llama3": Style("Llama 3's rule", "#661100", "p"),
    "mrrope-uni": Style("MrRoPE-Uni", "#999933", "<"),
    "mrrope-pro": Style("MrRoPE-Pro", "#332288", ">"),
    "cope": Style("CoPE", "#aa4499", "h"),
    "gradient": Style("LongRoPE, gradient", "#d55e00", "o", 2.5),
    "evolution": Style("LongRoPE, Algorithm 1", "#e69f00", "v", 1.8),
    "hybrid": Style("LongRoPE, hybrid", "#56b4e9", "P", 1.8),
    # A ladder of tiers: dashed, as its curve may lie on that of its last set of factors.
    "position": Style("LongRoPE, by position", "#000000", "*", 1.8, "--"),
}
#: What is ours where there is one such curve, and what is there for comparison only.
OURS, MUTED = STYLES["gradient"].color, "0.7"


def line(name: str, **changes: Any) -> dict[str, Any]:
    """Return the keyword arguments of `Axes.plot` that draw a method, some of them changed."""
    return STYLES[name]._asdict() | {"markersize": 4} | changes


def heat() -> Any:
    """Return the colours of a share: vermilion for none, white for half, blue for all."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = [STYLES["gradient"].color, "white", STYLES["yarn"].color]
    return LinearSegmentedColormap.from_list("share", ends).with_extremes(bad=MUTED)


def tidy(*axes: Any) -> None:
    """Remove the lines at the top and on the right, which no axis needs."""
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
