"""What a search is about: a model's rotary embedding, the lengths, and the space to search."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longrope import _validation
from longrope.factor_search.critical import CriticalSpace
from longrope.factor_search.evolution import EvolutionSettings
from longrope.factor_search.space import (
    BOUND_OVER_RATIO,
    START_TOKENS,
    Candidate,
    SearchSpace,
)
from longrope.factors import RescaleFactors, su_attention_factor, yarn_attention_factor
from longrope.patching import RopeSettings


@dataclass(frozen=True)
class Preset:
    """The settings that the paper and the official code differ in."""

    sizes: EvolutionSettings = field(default_factory=EvolutionSettings)
    samples: int = 5
    start_tokens: tuple[int, ...] = START_TOKENS
    bound_over_ratio: float | None = BOUND_OVER_RATIO  # None: lambda up to 1 + s


PRESETS = {
    # Table 4 and section 3.3; 5 documents.
    "paper": Preset(),
    # Above 512k the paper halves the sizes and uses 3 documents.
    "paper-long": Preset(
        EvolutionSettings(population=32, mutations=8, crossovers=8, parents=16), samples=3
    ),
    # The released code draws lambda from [1, 1 + s] and has another list of start tokens.
    "official-code": Preset(
        start_tokens=(0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64), bound_over_ratio=None
    ),
}


@dataclass(frozen=True)
class Problem:
    """Everything about a search that does not depend on the documents or on the method."""

    original_length: int
    target_length: int
    rope_theta: float
    rotary_dim: int
    attention_factor: float
    space: SearchSpace | CriticalSpace
    #: Whether the attention factor is learned; `attention_factor` is where that begins.
    learn_attention: bool = False

    @classmethod
    def of(
        cls,
        rope: RopeSettings,
        *,
        target_length: int,
        original_length: int | None,
        attention_factor: str | float,
        start_tokens: str | int,
        max_lambda: float | None,
        preset: Preset,
        critical_dimension: bool = False,
    ) -> Problem:
        """Check the arguments of `longrope.search` that define the problem, and put them together.

        Raises `ValueError` with one sentence for the first that is out of range.
        """
        if original_length is None:
            original_length = rope.original_length
        original_length = _validation.integer("original_length", original_length, 2)
        target_length = _validation.integer("target_length", target_length, 2)
        if target_length <= original_length:
            raise ValueError(
                f"target_length: expected more than the original length {original_length}, "
                f"got {target_length}"
            )
        ratio = target_length / original_length
        if max_lambda is not None:
            max_lambda = _validation.positive("max_lambda", max_lambda, above=1)
        choices = _start_token_choices(
            start_tokens, original_length, target_length, preset.start_tokens
        )
        if critical_dimension:
            space = CriticalSpace.of(
                original_length, target_length, rope.rope_theta, rope.rotary_dim, max_lambda,
                choices,
            )  # fmt: skip
        else:
            bound = preset.bound_over_ratio
            if max_lambda is None:
                max_lambda = 1 + ratio if bound is None else bound * ratio
            space = SearchSpace.of(rope.rotary_dim // 2, max_lambda, choices)
        return cls(
            original_length=original_length,
            target_length=target_length,
            rope_theta=rope.rope_theta,
            rotary_dim=rope.rotary_dim,
            attention_factor=_attention_factor(attention_factor, ratio, original_length),
            learn_attention=attention_factor == "search",
            space=space,
        )

    @property
    def lengths(self) -> dict[str, Any]:
        """The arguments that every constructor of `RescaleFactors` takes."""
        return {
            "original_length": self.original_length,
            "target_length": self.target_length,
            "rope_theta": self.rope_theta,
            "rotary_dim": self.rotary_dim,
        }

    def turns(self) -> np.ndarray:
        """Return how often each pair turns in the original window, unrescaled: float64 `[dims]`."""
        pairs = np.arange(self.space.dims)
        inv_freq = self.rope_theta ** (-2 * pairs / self.rotary_dim)
        return self.original_length * inv_freq / (2 * math.pi)

    def factors(self, candidate: Candidate) -> RescaleFactors:
        """Return a candidate as factors."""
        factor = candidate.attention_factor
        return RescaleFactors(
            candidate.lambdas,
            start_tokens=candidate.start_tokens,
            attention_factor=self.attention_factor if factor is None else factor,
            **self.lengths,
        )

    def baselines(self) -> dict[str, RescaleFactors]:
        """Return the factors that need no search, by name: the first of the population."""
        return {
            "pi": RescaleFactors.pi(**self.lengths),
            "ntk": RescaleFactors.ntk(**self.lengths),
            "yarn": RescaleFactors.yarn(**self.lengths),
        }

    def seeds(self) -> dict[str, Candidate]:
        """Return the first of the population: the baselines, with the fewest start tokens.

        They are on the grid and within the bounds of lambda, and the first three are themselves in
        a `CriticalSpace` too, although they lie outside: the search is never worse than what needs
        none. There the start of LongRoPE2 and the baselines snapped into the space follow.
        """
        space = SearchSpace(self.space.dims, self.space.upper, self.space.start_tokens)
        baselines = self.baselines()
        seeds = {name: space.snap(f.lambdas) for name, f in baselines.items()}
        if isinstance(self.space, CriticalSpace):
            seeds["critical"] = self.space.start()
            for name, factors in baselines.items():
                snapped = self.space.snap(factors.lambdas)
                if snapped not in seeds.values():
                    seeds[f"critical {name}"] = snapped
        return seeds


def _attention_factor(value: str | float, ratio: float, original_length: int) -> float:
    if value in ("yarn", "search"):
        return yarn_attention_factor(ratio)
    if value == "su":
        return su_attention_factor(ratio, original_length)
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError(
        f"attention_factor: expected 'yarn', 'su', 'search' or a positive number, got {value!r}"
    )


def _start_token_choices(
    value: str | int, original_length: int, target_length: int, choices: tuple[int, ...]
) -> tuple[int, ...]:
    if value == "search":
        # Beyond the original length, start tokens would turn by angles the model never saw.
        return tuple(n for n in choices if n <= original_length)
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if whole and 0 <= value < target_length:
        return (int(value),)
    raise ValueError(
        f"start_tokens: expected 'search' or an integer from 0 to below the target length "
        f"{target_length}, got {value!r}"
    )
