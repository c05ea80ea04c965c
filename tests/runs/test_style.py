"""The palette of all plots: curves that everybody can tell apart."""

import itertools
import math

import pytest

from longrope.runs.style import OURS, STYLES, line

#: Linear RGB as readers without green or red receptors see it (Machado, Oliveira, Fernandes 2009).
DEUTERANOPIA = (
    (0.367322, 0.860646, -0.227968),
    (0.280085, 0.672501, 0.047413),
    (-0.011820, 0.042940, 0.968881),
)
PROTANOPIA = (
    (0.152286, 1.052583, -0.204868),
    (0.114503, 0.786281, 0.099216),
    (-0.003882, -0.048116, 1.051998),
)
SIGHTS = {"all": None, "deuteranopia": DEUTERANOPIA, "protanopia": PROTANOPIA}
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


def difference(one, other):
    """Return the CIEDE2000 difference of two colours in L*a*b* (Sharma, Wu, Dalal 2005)."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean = (math.hypot(a1, b1) + math.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * math.sqrt(mean**7 / (mean**7 + 25**7))
    a1, a2 = stretch * a1, stretch * a2
    c1, c2 = math.hypot(a1, b1), math.hypot(a2, b2)
    h1, h2 = (math.degrees(math.atan2(b, a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    hue = (h1 + turn / 2) % 360 if c1 * c2 else h1 + h2
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    cosine = [math.cos(math.radians(n * hue - o)) for n, o in ((1, 30), (2, 0), (3, -6), (4, 63))]
    t = 1 - 0.17 * cosine[0] + 0.24 * cosine[1] + 0.32 * cosine[2] - 0.2 * cosine[3]
    lightness = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / math.sqrt(20 + (light - 50) ** 2))
    colour = (c2 - c1) / (1 + 0.045 * chroma)
    tint = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    around = 60 * math.exp(-(((hue - 275) / 25) ** 2))
    blue = -2 * math.sqrt(chroma**7 / (chroma**7 + 25**7)) * math.sin(math.radians(around))
    return math.sqrt(lightness**2 + colour**2 + tint**2 + blue * colour * tint)


@pytest.mark.parametrize(
    "one, other, expected",  # of the test data of Sharma, Wu and Dalal
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1, 2), (50, 0, 0), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((90.8027, -2.0831, 1.441), (91.1528, -1.6435, 0.0447), 1.4441),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_difference_is_that_of_the_standard(one, other, expected):
    assert difference(one, other) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seen", SIGHTS)
def test_colors_stay_apart(seen):
    colors = {name: lab(style.color, SIGHTS[seen]) for name, style in STYLES.items()}
    assert math.dist(colors["yarn"], colors["gradient"]) > 60  # the headline curves
    assert difference(colors["yarn"], colors["gradient"]) > 50
    for one, other in itertools.combinations(colors, 2):
        assert math.dist(colors[one], colors[other]) > 10, (one, other)
        assert difference(colors[one], colors[other]) > 13, (one, other)


def test_what_is_compared_most_stays_apart_in_grey():
    names = ("none", "pi", "ntk", "yarn", "gradient", "evolution", "position")
    lightness = sorted(lab(STYLES[name].color)[0] for name in names)
    assert all(b - a > 8 for a, b in itertools.pairwise(lightness))
    assert lightness[-1] < 75  # and no curve is as light as paper


def test_every_method_has_a_marker_and_a_label_of_its_own():
    for what in ("marker", "label", "color"):
        assert len({getattr(style, what) for style in STYLES.values()}) == len(STYLES)


def test_a_line_is_drawn_in_the_style_of_its_method():
    drawn = line("gradient", label="searched")
    assert drawn["color"] == OURS and drawn["label"] == "searched"
    assert drawn["linewidth"] > line("yarn")["linewidth"] > line("ntk")["linewidth"]
