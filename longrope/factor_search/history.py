"""The history of a search: an `Evaluation` for all that it measured; and its result."""

from __future__ import annotations

import enum
import html
import math
from dataclasses import dataclass

from longrope.factors import RescaleFactors

#: The origins of factors that need no search: a model that fails with them is at fault.
BASELINES = ("pi", "ntk", "yarn")


class Role(str, enum.Enum):
    """What windows are for; the values are what files hold, and equal to these strings."""

    SEARCH = "search"
    #: The first few search windows.
    SCREEN = "screen"
    #: The search windows of one stage of a race, but for its last stage.
    RACE = "race"
    #: Held-out windows, which decide in the end.
    VALIDATION = "validation"
    #: Random windows, on which a step computes the gradient too.
    GRADIENT = "gradient"

    __str__ = str.__str__  # in text the value, with every Python


@dataclass(frozen=True)
class Evaluation:
    """One measured candidate, or one step of a descent.

    Attributes
    ----------
    role
        What the windows were for: a `Role`, which compares equal to its string.
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
        finite. In a race, over all search windows that the candidate was measured on so far.
    windows
        How many windows were measured in this evaluation; in a race, those of the stage.
    """

    role: Role
    iteration: int
    origin: str
    lambdas: tuple[float, ...]
    start_tokens: int
    nll: float
    attention_factor: float
    windows: int

    @property
    def factors(self) -> tuple[tuple[float, ...], int, float]:
        """What tells candidates apart: `(lambdas, start_tokens, attention_factor)`."""
        return self.lambdas, self.start_tokens, self.attention_factor

    @property
    def perplexity(self) -> float:
        """`exp(nll)`."""
        return math.exp(self.nll) if self.nll < 700 else math.inf  # exp overflows above 709

    @property
    def forward_equivalents(self) -> int:
        """The cost in forward passes of one window; a backward pass counts 2."""
        return self.windows * (3 if self.role == Role.GRADIENT else 1)


@dataclass(frozen=True)
class SearchResult:
    """What `longrope.search` found.

    Attributes
    ----------
    factors
        The selected `RescaleFactors`.
    perplexity
        The perplexity of `factors` on the search windows.
    validation_perplexity
        The same on the validation windows; None where there were none.
    history
        Every evaluation and every step of a descent, in order, as `Evaluation` (role, iteration,
        origin, lambdas, start_tokens, attention_factor, nll, perplexity, windows). In a race a
        candidate has one for each stage that it was measured in.
    """

    factors: RescaleFactors
    perplexity: float
    validation_perplexity: float | None
    history: tuple[Evaluation, ...]

    def __repr__(self) -> str:
        """Say in a few lines what was found; the history may be megabytes."""
        return "\n  ".join(["SearchResult(", *(f"{k}: {v}" for k, v in self._rows())]) + "\n)"

    def _repr_html_(self) -> str:
        """Return the same as a table, for notebooks."""
        rows = (
            f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in self._rows()
        )
        return f"<table>{''.join(rows)}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        found = self.factors
        least, most = found.lambdas.min(), found.lambdas.max()
        yarn = {e.role: e.perplexity for e in self.history if e.origin == "yarn"}
        rows = [
            ("window", f"{found.original_length} to {found.target_length} tokens"),
            ("lambdas", f"{len(found.lambdas)}, from {least:.4g} to {most:.4g}"),
            ("start tokens", str(found.start_tokens)),
            ("attention factor", f"{found.attention_factor:.4g}"),
        ]
        for role, name, reached in (
            (Role.SEARCH, "search windows", self.perplexity),
            (Role.VALIDATION, "held-out windows", self.validation_perplexity),
        ):
            if reached is not None:
                compared = f", {yarn[role]:.4f} with YaRN" if role in yarn else ""
                rows.append((f"perplexity, {name}", f"{reached:.4f}{compared}"))
        passes = sum(e.forward_equivalents for e in self.history)
        return [*rows, ("cost", f"{passes} forward passes of a window")]
