"""What a search can be asked for: `SearchOptions`, and the presets behind its defaults."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from longrope import _validation
from longrope._validation import (
    checked_bos,
    choice,
    count,
    integer,
    natural,
    positive,
    probability,
    switch,
)
from longrope.factor_search.descent import DescentSettings
from longrope.factor_search.evolution import EvolutionSettings
from longrope.factor_search.history import Evaluation
from longrope.factor_search.space import BOUND_OVER_RATIO, START_TOKENS, STEPS, TOP
from longrope.runs.options import Options, about

METHODS = ("evolution", "gradient", "hybrid")
OBJECTIVES = ("perplexity", "needle")
SCALINGS = ("compose", "ignore")
PER = ("model", "layer", "head")


@dataclass(frozen=True)
class Preset:
    """The settings in which the paper and the official code differ."""

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
#: Algorithm 1 as the first half of a hybrid search: to find n_hat and a start.
HYBRID_SIZES = EvolutionSettings(population=16, mutations=8, crossovers=8, iterations=5, parents=8)

#: Headings in the help of the command.
PROBLEM, EVOLUTION, DESCENT, MACHINE = (
    "The factors and what they are measured by", "Evolution (Algorithm 1)", "Descent",
    "Run and machine",
)  # fmt: skip


_LENGTH = partial(integer, least=2)


def _one_of(choices: Collection[str]) -> Callable[[str, Any], str]:
    return partial(choice, choices=choices)


def _option(check: Callable, heading: str | None, help: str, default: Any = None) -> Any:
    return field(default=default, metadata=about(check, help, heading))


def _start_tokens(name: str, value: Any) -> str | int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if value == "search" or (whole and value >= 0):
        return value if value == "search" else int(value)
    raise ValueError(f"{name}: expected 'search' or an integer of at least 0, got {value!r}")


def _max_lambda(name: str, value: Any) -> float:
    return TOP / STEPS if value == math.inf else positive(name, value, above=1)


def _attention_factor(name: str, value: Any) -> str | float:
    if isinstance(value, str) and value in ("yarn", "su", "search"):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError(f"{name}: expected 'yarn', 'su', 'search' or a positive number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """The options of `longrope.search`, which explains them; None stands for their default there.

    Options that do not fit together are refused with one sentence (`ValueError`).
    """

    target_length: int = field(metadata=about(_LENGTH, "The window to reach, in tokens."))
    method: str = _option(
        _one_of(METHODS), None, "gradient (fast), evolution (Algorithm 1 of the paper) or hybrid.",
        "gradient",
    )  # fmt: skip
    preset: str = _option(
        _one_of(PRESETS), None, "Settings: paper, paper-long (above 512k) or official-code.",
        "paper",
    )  # fmt: skip
    seed: int = _option(_validation.seed, None, "Seed of every random choice.", 0)
    objective: str = _option(
        _one_of(OBJECTIVES), PROBLEM,
        "perplexity, or needle: the loss of answers far from their needle.", "perplexity",
    )  # fmt: skip
    ladder: bool = _option(
        switch, PROBLEM, "Search tiers by position, one for each doubling of the window.", False
    )
    per: str = _option(
        _one_of(PER), PROBLEM, "What has factors of its own: the model, each layer or each head.",
        "model",
    )  # fmt: skip
    scaling: str = _option(
        _one_of(SCALINGS), PROBLEM,
        "Factors or a scaling that the model has: compose (search on top) or ignore.", "compose",
    )  # fmt: skip
    last_tokens: int | None = _option(
        count, PROBLEM, "Score only this many tokens at the end of each window."
    )
    bos: str | bool | int = _option(
        checked_bos, PROBLEM, "BOS before every window: auto (where the tokenizer adds it), true, "
        "false or a token id.", "auto",
    )  # fmt: skip
    samples: int | None = _option(count, PROBLEM, "Search windows (paper: 5).")
    original_length: int | None = _option(
        _LENGTH, PROBLEM, "The window of the model; default: what its config says."
    )
    start_tokens: str | int = _option(_start_tokens, PROBLEM, 'A number, or "search".', "search")
    attention_factor: str | float | None = _option(
        _attention_factor, PROBLEM,
        '"yarn", "su", a number, or "search" (default of gradient and hybrid).',
    )  # fmt: skip
    max_lambda: float | None = _option(
        _max_lambda, PROBLEM, "Upper bound of the factors (paper: 1.25 s); inf: none (gradient)."
    )
    critical_dimension: bool = _option(
        switch, PROBLEM, "Search from a critical pair on (LongRoPE2).", False
    )
    iterations: int | None = _option(count, EVOLUTION, "Generations (paper: 40, hybrid: 5).")
    population: int | None = _option(
        count, EVOLUTION, "Candidates of the first generation (paper: 64, hybrid: 16)."
    )
    mutations: int | None = _option(
        natural, EVOLUTION, "Mutations in each later one (paper: 16, hybrid: 8)."
    )
    crossovers: int | None = _option(
        natural, EVOLUTION, "Crossovers in each later one (paper: 16, hybrid: 8)."
    )
    mutation_probability: float | None = _option(
        probability, EVOLUTION, "For each dimension of a mutation (0.3)."
    )
    parents: int | None = _option(
        count, EVOLUTION, "Candidates that survive (paper: 32, hybrid: 8)."
    )
    max_evaluations: int | None = _option(count, EVOLUTION, "Stop after this many candidates.")
    race: bool = _option(
        switch, EVOLUTION, "Drop clearly worse candidates after a few windows.", False
    )
    steps: int | None = _option(count, DESCENT, "Steps (80).")
    learning_rate: float | None = _option(positive, DESCENT, "Learning rate at the start (0.05).")
    windows_per_step: int | None = _option(count, DESCENT, "Random windows of a step (1).")
    activation_checkpointing: bool | None = _option(
        switch, DESCENT, "Go backwards in chunks, in less memory; default: where memory is short."
    )
    batch_size: int | None = _option(
        count, MACHINE, "Windows of one forward pass; default: by free memory."
    )
    shard_sequence: bool = _option(
        switch, MACHINE, "Spread each window over the ranks of torchrun (evolution).", False
    )

    def __post_init__(self):
        super().__post_init__()
        sizes = self._given(EvolutionSettings)
        if self.method == "gradient":
            self._without(f"method={self.method!r}", *sizes, "max_evaluations")
            if self.race:
                raise ValueError("race: expected False with method='gradient', got True")
        if self.method == "evolution":
            self._without(
                f"method={self.method!r}", *self._given(DescentSettings), "activation_checkpointing"
            )
            if self.attention_factor == "search":
                raise ValueError(
                    "attention_factor: expected 'yarn', 'su' or a number with method='evolution', "
                    "got 'search', which method='gradient' and 'hybrid' know"
                )
        elif self.shard_sequence:
            raise ValueError(
                f"shard_sequence: expected False with method={self.method!r}, whose steps go "
                "backwards through the model; method='evolution' can"
            )
        if self.method != "gradient" and self.max_lambda == TOP / STEPS:
            raise ValueError(
                f"max_lambda: expected a finite bound with method={self.method!r}, whose mutations "
                "reach up to it, got inf"
            )
        if self.per != "model":
            for name, value in (("method", "evolution"), ("critical_dimension", True)):
                if getattr(self, name) == value:
                    raise ValueError(
                        f"per: expected 'model' with {name}={value!r}, got {self.per!r}, whose "
                        "factors are found by descent on all pairs"
                    )
        if self.ladder and self.shard_sequence:
            raise ValueError(
                "shard_sequence: expected False with ladder=True, whose ranges go through the "
                "model on one device, got True"
            )
        evolves = self.method != "gradient" and self.sizes.iterations > 1
        if evolves and not self.sizes.mutations + self.sizes.crossovers:
            raise ValueError("mutations, crossovers: expected at least 1 of either, got 0 and 0")
        if self.objective == "needle":
            self._without(f"objective={self.objective!r}", "last_tokens")
        for name in ("last_tokens", "start_tokens"):
            value = getattr(self, name)
            if isinstance(value, int) and value >= self.target_length:
                raise ValueError(
                    f"{name}: expected less than the target length {self.target_length}, "
                    f"got {value}"
                )

    # --- what follows from them -----------------------------------------------------------------

    @property
    def sizes(self) -> EvolutionSettings:
        """The sizes of Algorithm 1: those given, and else the preset's or the hybrid's."""
        default = HYBRID_SIZES if self.method == "hybrid" else PRESETS[self.preset].sizes
        return dataclasses.replace(default, **self._given(EvolutionSettings))

    @property
    def descent(self) -> DescentSettings:
        """How far and how fast to descend."""
        return DescentSettings(**self._given(DescentSettings))

    @property
    def windows(self) -> int:
        """How many search windows there are at most."""
        return PRESETS[self.preset].samples if self.samples is None else self.samples

    @property
    def has_steps(self) -> bool:
        """Whether the method goes backwards through the model."""
        return self.method != "evolution"

    @property
    def limits(self) -> dict[str, int | None]:
        """How far a search goes: what a resumed one may raise."""
        if self.method == "gradient" or self.ladder:
            return {}
        return {"iterations": self.sizes.iterations, "max_evaluations": self.max_evaluations}

    def check_ranks(self, ranks: int) -> None:
        """Raise `ValueError` where a job of this many ranks cannot shard the windows as asked."""
        if self.shard_sequence and ranks == 1:
            raise ValueError(
                "shard_sequence: expected a torch.distributed job of 2 ranks or more, got 1"
            )
        if self.shard_sequence and self.target_length < 2 * ranks:
            raise ValueError(
                f"target_length: expected at least {2 * ranks} tokens to shard over {ranks} "
                f"ranks, got {self.target_length}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the options of a search by name, without those of a subclass."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(SearchOptions)}

    def _given(self, settings: type) -> dict[str, Any]:
        """Return the fields of `settings` that these options set."""
        values = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(settings)}
        return {name: value for name, value in values.items() if value is not None}

    def _without(self, setting: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: expected None with {setting}, got {getattr(self, name)!r}"
                )


def _progress(name: str, value: Any) -> bool | Callable[[Sequence[Evaluation]], None]:
    if not callable(value) and value not in (True, False):
        raise ValueError(f"{name}: expected True, False or a function, got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class SearchArguments(SearchOptions):
    """The keyword arguments of `search`: its options, and where and how it runs."""

    validation: Iterable[Any] | None = None
    out: str | Path | None = None
    resume: bool = field(default=True, metadata=about(switch))
    progress: bool | Callable[[Sequence[Evaluation]], None] = field(
        default=True, metadata=about(_progress)
    )
