"""What a search measured, an `Evaluation` per candidate and windows or per step, and found."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longrope.factors import RescaleFactors

#: The origins of factors that need no search: a model that fails with them is at fault.
BASELINES = ("pi", "ntk", "yarn")


@dataclass(frozen=True)
class Evaluation:
    """One measured candidate, or one step of a descent.

    Attributes
    ----------
    role
        Which windows: `"screen"` (the first few search windows), `"search"`, `"validation"`,
        `"race"` (the search windows up to one before the last, see `longrope.search`), or
        `"gradient"` for a step on random windows, where the gradient was computed too.
    iteration
        The generation or the number of the step; -1 at the end of a search.
    origin
        Where the candidate came from: `"pi"`, `"ntk"`, `"yarn"`, `"critical"` and `"critical pi"`
        (and so on: the first three put into the space of `critical_dimension`), `"ramp"`,
        `"mutation"`, `"crossover"`, `"gradient"`, `"start tokens"`, or for validation `"start"`,
        `"finalist"`.
    lambdas, start_tokens, attention_factor
        The factors that were measured; on the grid except in a step.
    nll
        Mean negative log-likelihood in nats per token; infinite where the model's output was not
        finite. In a race over all search windows that the candidate was measured on so far.
    windows
        How many windows were measured in this evaluation: in a race those since the one before.
    """

    role: str
    iteration: int
    origin: str
    lambdas: tuple[float, ...]
    start_tokens: int
    nll: float
    attention_factor: float
    windows: int

    @property
    def perplexity(self) -> float:
        """`exp(nll)`."""
        return math.exp(self.nll) if self.nll < 700 else math.inf  # exp overflows above 709

    @property
    def forward_equivalents(self) -> int:
        """The cost in forward passes of one window; a backward pass counts 2."""
        return self.windows * (3 if self.role == "gradient" else 1)


@dataclass(frozen=True)
class SearchResult:
    """What `longrope.search` found.

    Attributes
    ----------
    factors
        The selected `RescaleFactors`.
    perplexity
        Of `factors` on the search windows.
    validation_perplexity
        Of `factors` on the validation windows; None where there were none.
    history
        Every evaluation and every step of a descent, in order, as `Evaluation` (role, iteration,
        origin, lambdas, start_tokens, attention_factor, nll, perplexity, windows). In a race a
        candidate has one for each stage that it was measured in.
    """

    factors: RescaleFactors
    perplexity: float
    validation_perplexity: float | None
    history: tuple[Evaluation, ...]
