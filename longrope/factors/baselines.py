"""Factors that need no search: the constructors of `RescaleFactors` that are closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from longrope._validation import choice, count, even, longer, positive
from longrope.factors.rules import (
    LLAMA3_TURNS,
    cope_lambdas,
    dynamic_ntk_ratio,
    llama3_lambdas,
    mrrope_lambdas,
    ntk_lambdas,
    yarn_attention_factor,
    yarn_lambdas,
)

if TYPE_CHECKING:
    from longrope.factors.rescale import RescaleFactors


class Baselines:
    """What `RescaleFactors` inherits: one constructor for each rule."""

    @classmethod
    def none(
        cls,
        *,
        original_length: int,
        target_length: int | None = None,
        rope_theta: float = 10000.0,
        rotary_dim: int = 128,
    ) -> RescaleFactors:
        """Return factors that change nothing: every lambda is 1.

        `target_length` (default: `original_length`) only says up to which length they are meant.
        """
        target_length = original_length if target_length is None else target_length
        return cls._baseline(
            lambda s: np.ones(rotary_dim // 2), original_length, target_length, rope_theta,
            rotary_dim,
        )  # fmt: skip

    @classmethod
    def pi(
        cls,
        *,
        original_length: int,
        target_length: int,
        rope_theta: float = 10000.0,
        rotary_dim: int = 128,
    ) -> RescaleFactors:
        """Return position interpolation (arXiv 2306.15595): every lambda is the ratio `s`.

        transformers calls it rope type `"linear"`.
        """
        longer(original_length, target_length)
        return cls._baseline(
            lambda s: np.full(rotary_dim // 2, s), original_length, target_length, rope_theta,
            rotary_dim,
        )  # fmt: skip

    @classmethod
    def ntk(
        cls,
        *,
        original_length: int,
        target_length: int,
        rope_theta: float = 10000.0,
        rotary_dim: int = 128,
    ) -> RescaleFactors:
        """Return NTK-aware scaling: `lambda_i = s^(2i/(R-2))`, from 1 at the fastest to `s`.

        The same as a larger base `theta * s^(R/(R-2))`; transformers' rope type `"dynamic"` with
        factor 1 gives these frequencies at a sequence of `target_length` tokens.
        """
        longer(original_length, target_length)

        return cls._baseline(
            lambda s: ntk_lambdas(s, rotary_dim), original_length, target_length, rope_theta,
            rotary_dim,
        )  # fmt: skip

    @classmethod
    def yarn(
        cls,
        *,
        original_length: int,
        target_length: int,
        rope_theta: float = 10000.0,
        rotary_dim: int = 128,
        truncate: bool = True,
    ) -> RescaleFactors:
        """Return YaRN (arXiv 2309.00071) with its attention factor `0.1 ln s + 1`.

        `lambda_i = 1 / (ramp_i / s + 1 - ramp_i)`, where the ramp rises linearly over the
        dimension index, from 0 at the dimension that turns 32 times in the original window to 1 at
        the one that turns once. `truncate` rounds these two outwards to whole dimensions. Both
        settings agree with transformers' rope type `"yarn"`.
        """
        longer(original_length, target_length)
        made = cls._baseline(
            lambda s: yarn_lambdas(s, original_length, rope_theta, rotary_dim, truncate),
            original_length, target_length, rope_theta, rotary_dim,
        )  # fmt: skip
        return made.replace(attention_factor=yarn_attention_factor(made.ratio))

    @classmethod
    def mrrope(
        cls,
        *,
        original_length: int,
        target_length: int,
        rope_theta: float = 10000.0,
        rotary_dim: int = 128,
        variant: str = "pro",
    ) -> RescaleFactors:
        """Return MrRoPE (arXiv 2601.22181), with YaRN's band of pairs and its attention factor.

        The band is that of `yarn` (`truncate=True`): from the pair that turns 32 times in the
        original window, where lambda is still 1, `n` pairs on to the one that turns once, where it
        has reached `s`. At the pair `t = 0 .. n` of the band `variant` `"uni"` has
        `lambda = s^(t/n)`, and `"pro"` `lambda = s^(t(t+1) / (n(n+1)))`, which rises later.
        """
        longer(original_length, target_length)
        choice("variant", variant, ("pro", "uni"))
        made = cls._baseline(
            lambda s: mrrope_lambdas(s, original_length, rope_theta, rotary_dim, variant == "pro"),
            original_length, target_length, rope_theta, rotary_dim,
        )  # fmt: skip
        return made.replace(attention_factor=yarn_attention_factor(made.ratio))

    @classmethod
    def llama3(
        cls,
        *,
        original_length: int,
        target_length: int,
        rope_theta: float = 10000.0,
        rotary_dim: int = 128,
        low_freq_factor: float = LLAMA3_TURNS[0],
        high_freq_factor: float = LLAMA3_TURNS[1],
    ) -> RescaleFactors:
        """Return Llama 3.1's rule, with the ratio `s` as its factor.

        By the turns of a pair in the original window: at least `high_freq_factor` turns, lambda 1;
        at most `low_freq_factor`, lambda `s`; between them
        `1 / lambda = smooth + (1 - smooth) / s` with `smooth` linear in the turns. transformers'
        rope type `"llama3"`.
        """
        longer(original_length, target_length)
        low = positive("low_freq_factor", low_freq_factor)
        high = positive("high_freq_factor", high_freq_factor)
        if high <= low:
            raise ValueError(
                f"high_freq_factor: expected more than low_freq_factor ({low:g}), got {high:g}"
            )
        return cls._baseline(
            lambda s: llama3_lambdas(s, original_length, rope_theta, rotary_dim, low, high),
            original_length, target_length, rope_theta, rotary_dim,
        )  # fmt: skip

    @classmethod
    def dynamic_ntk(
        cls,
        *,
        original_length: int,
        target_length: int,
        rope_theta: float = 10000.0,
        rotary_dim: int = 128,
        factor: float | None = None,
    ) -> RescaleFactors:
        """Return what dynamic NTK scaling turns by when a sequence has `target_length` tokens.

        NTK-aware scaling at the ratio `factor * s - (factor - 1)`; `factor` is that of
        transformers' rope type `"dynamic"`, by default the ratio `s` itself. A dynamic model
        changes its factors with every token; these are one moment of it, and factor 1 is `ntk`.
        """
        longer(original_length, target_length)
        if factor is not None and positive("factor", factor) < 1:
            raise ValueError(f"factor: expected at least 1, got {factor}")
        return cls._baseline(
            lambda s: ntk_lambdas(dynamic_ntk_ratio(s, factor or s), rotary_dim),
            original_length, target_length, rope_theta, rotary_dim,
        )  # fmt: skip

    def cope(self, pairs: int | None = None) -> RescaleFactors:
        """Return these factors with the frequencies of the slowest pairs tapered to 0.

        CoPE (arXiv 2602.05258): pairs whose period is longer than the original window never finish
        a turn in training, so beyond it their angles are new to the model. Their frequencies are
        multiplied by `(1 + cos(linspace(0, pi, n))) / 2`: the first keeps its own, the last stops
        (lambda infinite, `inv_freq` 0). `RescaleFactors.none(...).cope()` is CoPE alone.

        Parameters
        ----------
        pairs
            How many of the slowest pairs are tapered; None: those whose unrescaled period
            `2 pi theta^(2i/R)` is longer than `original_length`.

        Raises
        ------
        ValueError
            For more pairs than there are.
        """
        if pairs is not None and count("pairs", pairs) > self.rotary_dim // 2:
            raise ValueError(
                f"pairs: expected at most the {self.rotary_dim // 2} pairs there are, got {pairs}"
            )
        return self.replace(
            lambdas=cope_lambdas(self.lambdas, self.base_inv_freq(), self.original_length, pairs)
        )

    @classmethod
    def _baseline(cls, lambdas, original_length, target_length, rope_theta, rotary_dim):
        # Validate the settings before the formula sees them.
        plain = cls(
            np.ones(even("rotary_dim", rotary_dim) // 2),
            original_length=original_length,
            target_length=target_length,
            rope_theta=rope_theta,
            rotary_dim=rotary_dim,
        )
        return plain.replace(lambdas=lambdas(plain.ratio))


def _of(rule: str, **options) -> Callable[..., RescaleFactors]:
    def make(**lengths) -> RescaleFactors:
        from longrope.factors.rescale import RescaleFactors  # it inherits from this module

        return getattr(RescaleFactors, rule)(**lengths, **options)

    return make


def _cope(**lengths) -> RescaleFactors:
    return _of("none")(**lengths).cope()


#: By name, functions of `original_length`, `target_length`, `rope_theta` and `rotary_dim`.
BASELINES: dict[str, Callable[..., RescaleFactors]] = {
    "pi": _of("pi"),
    "ntk": _of("ntk"),
    "dynamic-ntk": _of("dynamic_ntk"),
    "yarn": _of("yarn"),
    "llama3": _of("llama3"),
    "mrrope-uni": _of("mrrope", variant="uni"),
    "mrrope-pro": _of("mrrope", variant="pro"),
    "cope": _cope,
}
