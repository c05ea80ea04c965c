"""The history of a search: an `Evaluation` for all that it measured; and its result."""

from __future__ import annotations

import enum
import html
from dataclasses import dataclass

from longrope._numbers import perplexity_of
from longrope.factors import RescaleFactors, Tiers, baselines
from longrope.factors.heads import span

#: The origins of factors that need no search: a model that fails with them is at fault.
BASELINES = tuple(baselines.BASELINES)
#: The origin of the model as loaded, which is no candidate.
AS_LOADED = "model as loaded"


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
        Where the candidate came from: `"pi"`, `"ntk"`, `"yarn"` and the other closed forms by their
        names in `longrope.factors.baselines.BASELINES`, `"critical"` and `"critical pi"` (and so
        on: the closed forms put into the space of `critical_dimension`), `"ramp"`,
        `"mutation"`, `"crossover"`, `"gradient"`, `"start tokens"`, or for validation `"start"`,
        `"finalist"`. On top of a stage `"stage pi"` and so on: the rules for what is left of the
        ratio. In a ladder also `"tier below"` and `"stretched"`, what the tier below leads to, and
        `"yarn by position"`, behind tiers of YaRN. `"model as loaded"`: no candidate, but what
        there was before. With `per="layer"` or `"head"` `"heads, shared"`, `"heads"` and
        `"heads, mixed"`.
    lambdas, start_tokens, attention_factor
        The factors that were measured; on the grid except in a step. Of factors by layer and head
        their mean (`RescaleFactors.mean`).
    nll
        Mean negative log-likelihood in nats per token; infinite where the model's output was not
        finite. In a race, over all search windows that the candidate was measured on so far.
    windows
        How many windows were measured in this evaluation; in a race, those of the stage.
    tier
        With `ladder=True` the number of the tier that was searched, 1 for the first; else None.
    passes
        In a ladder the tokens that went through the model, in windows of `target_length`, those of
        a backward pass counted twice; else None.
    """

    role: Role
    iteration: int
    origin: str
    lambdas: tuple[float, ...]
    start_tokens: int
    nll: float
    attention_factor: float
    windows: int
    tier: int | None = None
    passes: float | None = None

    @property
    def factors(self) -> tuple[tuple[float, ...], int, float]:
        """What tells candidates apart: `(lambdas, start_tokens, attention_factor)`."""
        return self.lambdas, self.start_tokens, self.attention_factor

    @property
    def perplexity(self) -> float:
        """`exp(nll)`."""
        return perplexity_of(self.nll)

    @property
    def forward_equivalents(self) -> float:
        """The cost in forward passes of one window; a backward pass counts 2."""
        if self.passes is not None:
            return self.passes
        return self.windows * (3 if self.role == Role.GRADIENT else 1)


@dataclass(frozen=True)
class SearchResult:
    """What `longrope.search` found.

    Attributes
    ----------
    factors
        The selected `RescaleFactors`; of a ladder the last tier.
    perplexity
        The perplexity of `factors` on the search windows; of a ladder that of `tiers`, on the
        tokens beyond the tiers that were not searched.
    validation_perplexity
        The same on the validation windows; None where there were none.
    history
        Every evaluation and every step of a descent, in order, as `Evaluation` (role, iteration,
        origin, lambdas, start_tokens, attention_factor, nll, perplexity, windows). In a race a
        candidate has one for each stage that it was measured in.
    tiers
        With `ladder=True` the `Tiers`, those that the model began with first; else None, since
        nothing but `factors` was measured (`factors.ladder()` makes tiers of them).
    stages
        What `factors` are the product of: the factors of the model as the search found it, applied
        or in its config, and what the search put on top; `factors` alone where there were none, or
        with `scaling="ignore"`.
    loaded
        The model as loaded, with the scaling of its config or the factors that were applied: an
        `Evaluation` on the search windows, and one on the validation windows where there are any.
        At the end of `history` too, where there is such a scaling. Empty where it was not measured,
        as for a ladder.
    shared
        With `per="layer"` or `"head"` what the search found for all layers and heads alike, where
        it began; else None.
    """

    factors: RescaleFactors
    perplexity: float
    validation_perplexity: float | None
    history: tuple[Evaluation, ...]
    tiers: Tiers | None = None
    stages: tuple[RescaleFactors, ...] = ()
    loaded: tuple[Evaluation, ...] = ()
    shared: SearchResult | None = None

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
        if self.tiers is not None:
            yarn = {}  # what a ladder is compared with has tiers of its own
        loaded = {e.role: e.perplexity for e in self.loaded}
        rows = [
            ("window", f"{found.original_length} to {found.target_length} tokens"),
            ("lambdas", f"{found.lambdas.shape[-1]}, from {least:.4g} to {most:.4g}"),
            ("start tokens", str(found.start_tokens)),
            ("attention factor", span(found.attention_factor)),
        ]
        if found.per_head:
            layers, heads = found.heads
            each = f" and {heads} heads each" * (heads > 1)
            rows.insert(2, ("of their own", f"{layers} layers{each}"))
        if self.tiers is not None:
            ends = ", ".join(str(limit) for limit in self.tiers.limits)
            rows.insert(1, ("tiers by position", f"up to {ends} tokens"))
        for role, name, reached in (
            (Role.SEARCH, "search windows", self.perplexity),
            (Role.VALIDATION, "held-out windows", self.validation_perplexity),
        ):
            if reached is not None:
                compared = f", {yarn[role]:.4f} with YaRN" if role in yarn else ""
                compared += f", {loaded[role]:.4f} as loaded" if role in loaded else ""
                if self.shared is not None:
                    of_all = self.shared.perplexity, self.shared.validation_perplexity
                    compared += f", {of_all[role == Role.VALIDATION]:.4f} shared by all heads"
                rows.append((f"perplexity, {name}", f"{reached:.4f}{compared}"))
        passes = sum(e.forward_equivalents for e in self.history)
        return [*rows, ("cost", f"{passes:.6g} forward passes of a window")]
