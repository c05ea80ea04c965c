"""How plots look: one colour and one marker for each method, the same in every figure.

The colours were searched for: between any two the CIEDE2000 difference is 13 or more, as everybody
sees them and as readers without red or green receptors do, and the lightness (L*) of what is
compared most, the model as loaded, PI, NTK, YaRN and the searches, differs by 8 or more, which a
printer without colours keeps apart. The two headline curves, YaRN and the default search, are blue
and orange.
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


#: By the name of the method.
STYLES = {
    "none": Style("none", "#434343", "x"),
    "pi": Style("PI", "#f78afe", "s"),
    "ntk": Style("NTK", "#0d986f", "^"),
    "dynamic-ntk": Style("dynamic NTK", "#0a89ac", "1"),
    "yarn": Style("YaRN", "#005ca4", "D", 1.8),
    "llama3": Style("Llama 3's rule", "#7e563e", "p"),
    "mrrope-uni": Style("MrRoPE-Uni", "#193300", "<"),
    "mrrope-pro": Style("MrRoPE-Pro", "#5f7277", ">"),
    "cope": Style("CoPE", "#00226d", "h"),
    "gradient": Style("LongRoPE, gradient", "#f17a1b", "o", 2.5),
    "evolution": Style("LongRoPE, Algorithm 1", "#a36100", "v", 1.8),
    "hybrid": Style("LongRoPE, hybrid", "#78a6a9", "P", 1.8),
    # A ladder of tiers: dashed, as its curve may lie on that of its last set of factors.
    "position": Style("LongRoPE, by position", "#000000", "*", 1.8, "--"),
}
#: The searches, and what is made of what one of them found.
METHODS = ("gradient", "evolution", "hybrid", "position")
#: What is ours where there is one such curve, and what is there for comparison only.
OURS, MUTED = STYLES["gradient"].color, "0.7"


def line(name: str, **changes: Any) -> dict[str, Any]:
    """Return the keyword arguments of `Axes.plot` that draw a method, some of them changed."""
    return STYLES[name]._asdict() | {"markersize": 4} | changes
