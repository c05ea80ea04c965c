"""What a search is about: a model's rotary embedding, the lengths, and the space to search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from longrope.evaluation import needles
from longrope.factor_search.critical import CriticalSpace
from longrope.factor_search.options import PRESETS, SearchOptions
from longrope.factor_search.space import Candidate, SearchSpace
from longrope.factors import RescaleFactors, su_attention_factor, yarn_attention_factor
from longrope.factors.rules import base_inv_freq
from longrope.patching import RopeSettings


@dataclass(frozen=True)
class Problem:
    """Everything about a search that does not depend on the documents or on the method."""

    original_length: int
    target_length: int
    rope_theta: float
    rotary_dim: int
    attention_factor: float
    space: SearchSpace | CriticalSpace
    #: Whether the attention factor is learned, starting from `attention_factor`.
    learn_attention: bool = False
    #: The token in front of every window; None: there is none.
    bos: int | None = None
    #: Only this many tokens at the end of each window are scored; None: all but the first.
    last_tokens: int | None = None

    @classmethod
    def of(cls, rope: RopeSettings, options: SearchOptions, bos: int | None = None) -> Problem:
        """Put together what the options ask of a model with these rope settings.

        With `bos` the first token of a window's text is not scored either: windows begin anywhere.
        Raises `ValueError` with one sentence where they do not fit the model.
        """
        original = options.original_length or rope.original_length
        target = options.target_length
        if target <= original:
            raise ValueError(
                f"target_length: expected more than the original length {original}, got {target}"
            )
        last_tokens = options.last_tokens
        if options.objective == "needle":
            last_tokens = needles.ANSWER_TOKENS
            if target < needles.SHORTEST:
                raise ValueError(
                    f"target_length: expected at least {needles.SHORTEST} tokens with "
                    f"objective='needle', got {target}"
                )
        if bos is not None:  # BOS and the first token of the text, which has nothing else before it
            last_tokens = min(last_tokens or target, target - 2)
        ratio = target / original
        preset, bound = PRESETS[options.preset], options.max_lambda
        if options.start_tokens == "search":
            # Beyond the original length, start tokens would turn by angles the model never saw.
            choices = tuple(n for n in preset.start_tokens if n <= original)
        else:
            choices = (options.start_tokens,)
        if options.critical_dimension:
            space = CriticalSpace.of(
                original, target, rope.rope_theta, rope.rotary_dim, bound, choices
            )
        else:
            if bound is None:
                over = preset.bound_over_ratio
                bound = 1 + ratio if over is None else over * ratio
            space = SearchSpace.of(rope.rotary_dim // 2, bound, choices)
        factor = options.attention_factor
        if factor is None:
            factor = "search" if options.has_steps else "yarn"
        learned = factor == "search"
        if factor == "su":
            factor = su_attention_factor(ratio, original)
        elif isinstance(factor, str):
            factor = yarn_attention_factor(ratio)
        return cls(
            original_length=original,
            target_length=target,
            rope_theta=rope.rope_theta,
            rotary_dim=rope.rotary_dim,
            attention_factor=factor,
            space=space,
            learn_attention=learned,
            bos=bos,
            last_tokens=last_tokens,
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
        inv_freq = base_inv_freq(self.rope_theta, self.rotary_dim)
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
        """Return the factors that need no search, by name: PI, NTK and YaRN."""
        return {
            "pi": RescaleFactors.pi(**self.lengths),
            "ntk": RescaleFactors.ntk(**self.lengths),
            "yarn": RescaleFactors.yarn(**self.lengths),
        }

    def seeds(self) -> dict[str, Candidate]:
        """Return the first members of the population: the baselines, with the fewest start tokens.

        They are on the grid and within the bounds of lambda. With a `CriticalSpace` the baselines
        stay as they are, although they lie outside it, so that the search is never worse than they
        are; the start of LongRoPE2 and the baselines snapped into the space follow them.
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
