"""Heat maps of factors by layer and head."""

from __future__ import annotations

from typing import Any

import numpy as np

from longrope.factors import RescaleFactors
from longrope.report.page import Figure


def head_figure(name: str, factors: RescaleFactors) -> Figure:
    """Return the maps of `draw_heads`."""

    def draw(figure: Any) -> None:
        draw_heads(figure, factors)

    caption = (
        "Factors of every head beside the mean of all of them: above 0 it is stretched more. Left "
        "by pair of dimensions, right the attention factor."
    )
    return Figure(name, caption, draw, (7.2, 3.0))


def draw_heads(figure: Any, factors: RescaleFactors) -> None:
    """Draw two maps: log2 of lambda and of the attention factor over those of `factors.mean()`.

    Left a column for each head, layer after layer, and a row for each pair; right by layer and
    head.
    """
    mean, (layers, heads) = factors.mean(), factors.heads
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    ratios = np.log2(factors.lambdas / mean.lambdas).reshape(layers * heads, -1).T
    strength = np.log2(factors.attention_factor / mean.attention_factor)
    for axes, values, title in (
        (left, ratios, "$\\log_2 \\lambda_i$ over the mean"),
        (right, strength, "$\\log_2$ attention factor"),
    ):
        most = max(float(np.abs(values[np.isfinite(values)]).max(initial=0)), 1e-6)
        axes.grid(False)
        image = axes.imshow(
            values, cmap="PuOr", vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
        )
        figure.colorbar(image, ax=axes)
        axes.set_title(title)
    for layer in range(1, layers):
        left.axvline(layer * heads - 0.5, color="0.3", linewidth=0.6)
    step = max(1, layers // 8)
    shown = range(0, layers, step)
    left.set_xticks([(layer + 0.5) * heads - 0.5 for layer in shown], shown)
    left.set(xlabel="layer" + f", {heads} heads each" * (heads > 1), ylabel="pair $i$")
    right.set_xticks(range(0, heads, max(1, heads // 8)))
    right.set_yticks(shown)
    right.set(xlabel="head", ylabel="layer")
