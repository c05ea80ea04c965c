"""Measuring candidates for a tier of a ladder: the tokens of its range alone take part.

The prefix, a window's tokens below the range, takes the tiers below, which are fixed. Its keys and
values before their rotation do not depend on the candidate (`longrope.patching.ranges`): the
evaluator computes those of every window once, and the gradient those of every step's windows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope.distributed.ranks import Ranks
from longrope.evaluation.memory import BackwardPlan
from longrope.evaluation.nll import NextTokenNLL
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.gradient import GradientEvaluator
from longrope.factor_search.space import Candidate
from longrope.factor_search.windows import scored_tokens
from longrope.factors import RescaleFactors, Tiers
from longrope.patching.ranges import (
    RangeRotaryEmbedding,
    joined,
    range_cache,
    ranges,
    turned_as_loaded,
)


class Prefix:
    """The tiers below a range, and how a window's tokens below it go through the model.

    Parameters
    ----------
    model
        A causal language model.
    below
        The tiers below the range, the first of them the model as loaded.
    score
        Runs the model, in chunks where windows are long.
    keep
        Whether the prefixes of windows are kept from one call to the next.
    """

    def __init__(self, model: nn.Module, below: Tiers, score: NextTokenNLL, keep: bool):
        self.model, self.below, self.score, self.keep = model, below, score, keep
        self.first_by_model = turned_as_loaded(model, below)
        self._kept: dict[bytes, Any] = {}

    @property
    def end(self) -> int:
        """The tokens below the range."""
        return self.below.limits[-1]

    def cache(self, length: int, differentiable: bool = False) -> Any:
        """Return an empty cache for windows of `length` tokens."""
        return range_cache(self.model, length - 1, self.below.limits[0], differentiable)

    def of_windows(
        self, windows: torch.Tensor, rotary: RangeRotaryEmbedding, differentiable: bool = False
    ) -> Any:
        """Return a cache that holds the prefixes of windows `[B, N]`.

        Each window goes through the model by itself, whatever else is measured with it: so a search
        that is resumed finds the same bits.
        """
        prefixes = [self._of_window(row[None], rotary) for row in windows]
        if not self.keep:
            self.forget()
        return joined(prefixes, self.cache(windows.shape[1], differentiable))

    def forget(self) -> None:
        """Free the prefixes that are kept."""
        self._kept.clear()

    def _of_window(self, window: torch.Tensor, rotary: RangeRotaryEmbedding) -> Any:
        name = window.cpu().numpy().tobytes()
        if name not in self._kept:
            self._kept[name] = self._feed(window, rotary, self.cache(self.end + 1))
        return self._kept[name]

    def _feed(self, window: torch.Tensor, rotary: RangeRotaryEmbedding, cache: Any) -> Any:
        """Put the prefix of a window into an empty cache, tier by tier; returns it."""
        for number, tier in enumerate(self.below):
            if number == 0 and self.first_by_model:
                rotary.turn_as_loaded()
            else:
                rotary.turn_by_factors(tier)
            self.score.feed(window, tier.target_length, cache)
        return cache


class RangeEvaluator(PopulationEvaluator):
    """As `PopulationEvaluator`, for the range of positions behind tiers that are fixed.

    Windows end with the range; `last_tokens` leaves no more scored than tokens of the range
    predict.

    Parameters
    ----------
    model, to_factors, rows, last_tokens, chunk
        As for `PopulationEvaluator`.
    below
        The tiers below the range.
    keep
        Whether the prefixes of windows are kept from one call to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        to_factors: Callable[[Candidate], RescaleFactors],
        rows: int,
        last_tokens: int,
        chunk: int | None,
        below: Tiers,
        keep: bool = True,
    ):
        super().__init__(model, to_factors, rows, last_tokens, chunk)
        self._prefix = Prefix(model, below, self._score, keep)

    def forget(self) -> None:
        """Free the prefixes that are kept."""
        self._prefix.forget()

    @contextlib.contextmanager
    def _turning(self) -> Iterator[Callable[..., None]]:
        with ranges(self.model) as self._rotary:
            yield self._rotary.turn_by

    def _sums(self, ids: torch.Tensor, scored: int, blocks: int) -> torch.Tensor:
        settings = self._rotary.settings
        cache = self._prefix.of_windows(ids, self._rotary)
        self._rotary.settings = settings
        return self._score.sums(ids, scored, blocks, cache)


class RangeGradient(GradientEvaluator):
    """As `GradientEvaluator`, for the range of positions behind tiers that are fixed.

    Parameters
    ----------
    model, base_inv_freq, plan, last_tokens, ranks
        As for `GradientEvaluator`.
    below
        The tiers below the range.
    keep
        Whether the prefixes of windows are kept from one call to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        base_inv_freq: np.ndarray,
        plan: BackwardPlan,
        last_tokens: int,
        ranks: Ranks,
        below: Tiers,
        keep: bool = True,
    ):
        super().__init__(model, base_inv_freq, plan, last_tokens, ranks)
        self._prefix = Prefix(model, below, self._score, keep)

    def _backward(
        self, window: torch.Tensor, inv_freq: torch.Tensor, start_tokens: int, factor: torch.Tensor
    ) -> torch.Tensor:
        with ranges(self.model) as rotary:
            with torch.no_grad():
                cache = self._prefix.of_windows(window, rotary, differentiable=True)
            rotary.turn_by(inv_freq, start_tokens, factor)
            return self._score.backward(window, scored_tokens(window, self.last_tokens), cache)
