"""What a search is about: a model's rotary embedding, the lengths, and the space to search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longrope.evaluation import needles
from longrope.factor_search.critical import CriticalSpace
from longrope.factor_search.options import PRESETS, SearchOptions
from longrope.factor_search.space import STEPS, TOP, Candidate, SearchSpace
from longrope.factors import RescaleFactors, su_attention_factor, yarn_attention_factor
from longrope.factors.baselines import BASELINES
from longrope.factors.rules import base_inv_freq, closed_forms
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
    #: What candidates multiply: the factors of the model as the search found it. None: the base.
    stage: RescaleFactors | None = None
    #: In a ladder the candidate that the tier below has taken, with its attention factor, and its
    #: target length.
    below: tuple[Candidate, int] | None = None
    #: The shapes of ramps to begin with; None: the whole family.
    shapes: tuple[tuple[float, float], ...] | None = None
    #: Whether candidates have YaRN's attention factor, or begin with it.
    yarn_attention: bool = True

    @classmethod
    def of(
        cls,
        rope: RopeSettings,
        options: SearchOptions,
        bos: int | None = None,
        stage: RescaleFactors | None = None,
        target_length: int | None = None,
    ) -> Problem:
        """Put together what the options ask of a model with these rope settings.

        With `bos` the first token of a window's text is not scored either: windows begin anywhere.
        With a `stage` candidates are stages of ratio `target_length / stage.target_length` on top
        of it. `target_length` is that of a tier, where it is not the options'. Raises `ValueError`
        with one sentence where they do not fit the model.
        """
        original = (rope if stage is None else stage).original_length
        if options.original_length is not None:
            if stage is not None and options.original_length != original:
                raise ValueError(
                    f"original_length: expected {original}, from which the factors or the scaling "
                    f"of the model count, got {options.original_length}; scaling='ignore' searches "
                    "from the base"
                )
            original = options.original_length
        target = options.target_length if target_length is None else target_length
        if target <= original:
            raise ValueError(
                f"target_length: expected more than the original length {original}, got {target}"
            )
        if stage is not None and target <= stage.target_length:
            raise ValueError(
                "target_length: expected more than the window of the model as loaded, "
                f"{stage.target_length}, got {target}; scaling='ignore' searches from the base"
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
        whole = target / original
        ratio = whole if stage is None else target / stage.target_length
        preset, bound = PRESETS[options.preset], options.max_lambda
        if options.start_tokens == "search":
            # Beyond the original length, start tokens would turn by angles the model never saw.
            choices = tuple(n for n in preset.start_tokens if n <= original)
        else:
            choices = (options.start_tokens,)
        if options.critical_dimension:
            space = CriticalSpace.of(
                original,
                target if stage is None else original * ratio,
                rope.rope_theta,
                rope.rotary_dim,
                bound,
                choices,
            )
        else:
            if bound is None:
                over = preset.bound_over_ratio
                bound = 1 + ratio if over is None else over * ratio
            space = SearchSpace.of(rope.rotary_dim // 2, bound, choices)
        factor = options.attention_factor
        if factor is None:
            factor = "search" if options.has_steps else "yarn"
        learned, by_yarn = factor == "search", factor in ("yarn", "search")
        if factor == "su":
            factor = su_attention_factor(whole, original)
        elif isinstance(factor, str):
            factor = yarn_attention_factor(ratio)
            factor *= 1.0 if stage is None else stage.attention_factor
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
            stage=stage,
            yarn_attention=by_yarn,
        )

    @property
    def ratio(self) -> float:
        """The ratio of the search: the target over the window that it starts from."""
        start = self.original_length if self.stage is None else self.stage.target_length
        return self.target_length / start

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
        """Return how often each pair turns in the window before the search: float64 `[dims]`."""
        window = self.original_length if self.stage is None else self.stage.target_length
        return window * self.unit_inv_freq() / (2 * math.pi)

    def unit_inv_freq(self) -> np.ndarray:
        """Return the frequencies that the lambdas of candidates divide, float64 `[dims]`."""
        if self.stage is None:
            return base_inv_freq(self.rope_theta, self.rotary_dim)
        return self.stage.inv_freq()

    def absolute(self, lambdas: Sequence[float]) -> np.ndarray:
        """Return what counts from the base, of lambdas on top of the stage: float64 `[dims]`."""
        found = np.asarray(lambdas, np.float64)
        return found if self.stage is None else self.stage.lambdas * found

    def on_stage(self, candidate: Candidate) -> Sequence[float]:
        """Return a candidate's lambdas on top of the stage."""
        if not candidate.from_base:
            return candidate.lambdas
        found = np.array(candidate.lambdas) / self.stage.lambdas
        return np.maximum(found, 1 / STEPS)  # of a pair that the stage has stopped

    def factors(self, candidate: Candidate) -> RescaleFactors:
        """Return a candidate as factors."""
        factor, lambdas = candidate.attention_factor, candidate.lambdas
        return RescaleFactors(
            lambdas if candidate.from_base else self.absolute(lambdas),
            start_tokens=candidate.start_tokens,
            attention_factor=self.attention_factor if factor is None else factor,
            **self.lengths,
        )

    def baselines(self) -> dict[str, RescaleFactors]:
        """Return the factors that need no search, by name: the closed forms as they are."""
        return {name: make(**self.lengths) for name, make in BASELINES.items()}

    def stage_parts(self, factors: RescaleFactors) -> tuple[RescaleFactors, ...]:
        """Return what factors are the product of: the stage and what is on top of it."""
        if self.stage is None:
            return (factors,)
        stage = self.stage
        with np.errstate(invalid="ignore"):  # inf / inf, of a pair that the stage has stopped
            lambdas = np.where(np.isinf(stage.lambdas), 1.0, factors.lambdas / stage.lambdas)
        on_top = factors.replace(
            lambdas=lambdas,
            attention_factor=factors.attention_factor / stage.attention_factor,
            original_length=stage.target_length,
        )
        return stage, on_top

    def rules(self) -> dict[str, Candidate]:
        """Return the closed forms, with the fewest start tokens.

        They count from the base; with a stage they lie outside the space, and have the attention
        factor of the whole ratio. Pairs that a rule stops (CoPE's last) or slows down beyond the
        bound of lambda have the bound; with a stage, `TOP`.
        """
        top = self.space.upper
        changes: dict[str, Any] = {}
        if self.stage is not None:
            top = TOP
            changes = {"from_base": True}
            if self.yarn_attention:
                ratio = self.target_length / self.original_length
                changes["attention_factor"] = yarn_attention_factor(ratio)
        space = SearchSpace(self.space.dims, top, self.space.start_tokens)
        whole = self.target_length / self.original_length
        found = {name: space.snap(lambdas) for name, lambdas in self._closed_forms(whole).items()}
        return {name: dataclasses.replace(c, **changes) for name, c in found.items()}

    def seeds(self) -> dict[str, Candidate]:
        """Return the first members of the population, with the fewest start tokens.

        The closed forms; with a stage, those of the ratio that is left, on top of it. They are on
        the grid and within the bounds of lambda. With a `CriticalSpace` they stay as they are,
        although they lie outside it, so that the search is never worse than they are; the start of
        LongRoPE2 and the closed forms snapped into the space follow them. In a ladder those that
        the tier below leads to follow.
        """
        space = SearchSpace(self.space.dims, self.space.upper, self.space.start_tokens)
        rules = self._closed_forms(self.ratio)
        prefix = "" if self.stage is None else "stage "
        seeds = {prefix + name: space.snap(lambdas) for name, lambdas in rules.items()}
        if isinstance(self.space, CriticalSpace):
            seeds["critical"] = self.space.start()
            for name, lambdas in rules.items():
                snapped = self.space.snap(lambdas)
                if snapped not in seeds.values():
                    seeds[f"critical {name}"] = snapped
        for name, candidate in self._from_below().items():
            if candidate not in seeds.values():
                seeds[name] = candidate
        return seeds

    def _closed_forms(self, ratio: float) -> dict[str, np.ndarray]:
        """Return the lambdas of the closed forms for a ratio, by name.

        On top of a stage too the bands of YaRN and the like stay at the turns in the original
        window: there lie the pairs that the stage has already slowed down to turns that the model
        knows, and that must slow down again.
        """
        return closed_forms(ratio, self.original_length, self.rope_theta, self.rotary_dim)

    @property
    def attention_from_below(self) -> float | None:
        """The attention factor that the tier below leads to, where it is learned, else None.

        On top of the stage's own, to the power of `ln r / ln r_below`, with `r` the ratios.
        """
        if self.below is None or not self.learn_attention:
            return None
        own = 1.0 if self.stage is None else self.stage.attention_factor
        return round(own * (self.below[0].attention_factor / own) ** self._power, 3)

    @property
    def _power(self) -> float:
        lower = dataclasses.replace(self, target_length=self.below[1])
        return math.log(self.ratio) / math.log(lower.ratio)

    def _from_below(self) -> dict[str, Candidate]:
        """Return what the factors of the tier below lead to at this target.

        `"tier below"` has them to the power of `ln r / ln r_below`, with `r` the ratios; for
        `"stretched"` all pairs of the tier below slow down by `r / r_below`.
        """
        if self.below is None:
            return {}
        candidate, length = self.below
        lower = dataclasses.replace(self, target_length=length)
        lambdas = np.asarray(self.on_stage(candidate), np.float64)
        found = {}
        for name, values in (
            ("tier below", lambdas**self._power),
            ("stretched", lambdas * (self.ratio / lower.ratio)),
        ):
            snapped = self.space.snap(values, candidate.start_tokens)
            factor = self.attention_from_below
            found[name] = dataclasses.replace(snapped, attention_factor=factor)
        return found
