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
    """

    def __init__(self, model: nn.Module, below: Tiers, score: NextTokenNLL):
        self.model, self.below, self.score = model, below, score
        self.first_by_model = turned_as_loaded(model, below)

    @property
    def end(self) -> int:
        """The tokens below the range."""
        return self.below.limits[-1]

    def cache(self, length: int, differentiable: bool = False) -> Any:
        """Return an empty cache for windows of `length` tokens."""
        return range_cache(self.model, length - 1, self.below.limits[0], differentiable)

    def of_window(
        self, window: torch.Tensor, rotary: RangeRotaryEmbedding, kept: dict[bytes, Any]
    ) -> Any:
        """Return a cache that holds the prefix of a window `[1, N]`, and keep it in `kept`.

        The window goes through the model by itself, whatever else is measured with it: so a search
        that is resumed finds the same bits.
        """
        name = window.cpu().numpy().tobytes()
        if name not in kept:
            kept[name] = self._feed(window, rotary, self.cache(self.end + 1))
        return kept[name]

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
        self.keep = keep
        self._prefix = Prefix(model, below, self._score)
        self._kept: dict[bytes, Any] = {}

    def forget(self) -> None:
        """Free the prefixes that are kept."""
        self._kept.clear()

    @contextlib.contextmanager
    def _turning(self) -> Iterator[Callable[..., None]]:
        with ranges(self.model) as self._rotary:
            yield self._rotary.turn_by

    def _sums(self, ids: torch.Tensor, scored: int, blocks: int) -> torch.Tensor:
        if not self.keep:
            self._kept.clear()
        settings = self._rotary.settings
        prefixes = [self._prefix.of_window(row[None], self._rotary, self._kept) for row in ids]
        self._rotary.settings = settings
        cache = joined(prefixes, self._prefix.cache(ids.shape[1]))
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
        self.keep = keep
        self._prefix = Prefix(model, below, self._score)
        self._kept: dict[bytes, Any] = {}

    def _backward(
        self, window: torch.Tensor, inv_freq: torch.Tensor, start_tokens: int, factor: torch.Tensor
    ) -> torch.Tensor:
        with ranges(self.model) as rotary:
            cache = self._prefix.cache(window.shape[1], differentiable=True)
            with torch.no_grad():
                if not self.keep:
                    self._kept.clear()
                joined([self._prefix.of_window(window, rotary, self._kept)], cache)
            rotary.turn_by(inv_freq, start_tokens, factor)
            return self._score.backward(window, scored_tokens(window, self.last_tokens), cache)
