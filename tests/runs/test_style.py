"""The palette of all plots: curves that everybody can tell apart."""

import itertools
import math

import pytest

from longrope.runs.style import OURS, STYLES, line

#: Linear RGB as a reader without green receptors sees it (Machado, Oliveira, Fernandes 2009).
DEUTERANOPIA = (
    (0.367322, 0.860646, -0.227968),
    (0.280085, 0.672501, 0.047413),
    (-0.011820, 0.042940, 0.968881),
)
TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
WHITE = (0.95047, 1.0, 1.08883)


def lab(color, seen=None):
    """Return CIE L*a*b* of a `#rrggbb`, through the matrix `seen` where it is given."""
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    rgb = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
    for matrix in (seen, TO_XYZ) if seen else (TO_XYZ,):
        rgb = [min(max(sum(m * v for m, v in zip(row, rgb, strict=True)), 0), 2) for row in matrix]
    x, y, z = (
        (v / w) ** (1 / 3) if v / w > 216 / 24389 else (24389 / 27 * v / w + 16) / 116
        for v, w in zip(rgb, WHITE, strict=True)
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("seen", [None, DEUTERANOPIA], ids=["all", "deuteranopia"])
def test_colors_stay_apart(seen):
    colors = {name: lab(style.color, seen) for name, style in STYLES.items()}
    assert math.dist(colors["yarn"], colors["gradient"]) > 60  # the headline curves
    for one, other in itertools.combinations(colors, 2):
        assert math.dist(colors[one], colors[other]) > 10, (one, other)


def test_every_method_has_a_marker_and_a_label_of_its_own():
    for what in ("marker", "label", "color"):
        assert len({getattr(style, what) for style in STYLES.values()}) == len(STYLES)


def test_a_line_is_drawn_in_the_style_of_its_method():
    drawn = line("gradient", label="searched")
    assert drawn["color"] == OURS and drawn["label"] == "searched"
    assert drawn["linewidth"] > line("yarn")["linewidth"] > line("ntk")["linewidth"]
