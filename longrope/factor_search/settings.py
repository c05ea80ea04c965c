"""What `longrope.search` was asked for, checked; all that does not depend on the documents."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from longrope import _validation
from longrope.evaluation import needles
from longrope.factor_search import racing
from longrope.factor_search.descent import DescentSettings
from longrope.factor_search.evolution import EvolutionSettings
from longrope.factor_search.methods import HYBRID_SIZES, METHODS
from longrope.factor_search.problem import PRESETS, Problem
from longrope.patching import RopeSettings

OBJECTIVES = ("perplexity", "needle")


@dataclass(frozen=True)
class Settings:
    """The settings of a search; the names are those of the arguments of `longrope.search`."""

    method: str
    objective: str
    last_tokens: int | None
    problem: Problem
    sizes: EvolutionSettings
    descent: DescentSettings
    activation_checkpointing: bool | None
    samples: int
    seed: int
    batch_size: int | None
    max_evaluations: int | None
    race: bool
    critical_dimension: bool
    shard_sequence: bool

    @classmethod
    def of(
        cls,
        rope: RopeSettings,
        ranks: int,
        *,
        method: str,
        objective: str,
        last_tokens: int | None,
        preset: str,
        problem: dict[str, Any],
        sizes: dict[str, Any],
        descent: dict[str, Any],
        activation_checkpointing: bool | None,
        samples: int | None,
        seed: int,
        batch_size: int | None,
        max_evaluations: int | None,
        race: bool,
        shard_sequence: bool,
    ) -> Settings:
        """Check the arguments of `longrope.search` together.

        `problem`, `sizes` and `descent` hold those of `Problem.of`, `EvolutionSettings` and
        `DescentSettings`; in the latter two None stands for the default. `ranks` is the size of the
        job. Raises `ValueError` with one sentence for the first that is out of range.
        """
        for name, value, choices in (
            ("method", method, METHODS), ("objective", objective, OBJECTIVES),
            ("preset", preset, PRESETS),
        ):  # fmt: skip
            if value not in choices:
                listed = ", ".join(repr(choice) for choice in choices)
                raise ValueError(f"{name}: expected one of {listed}, got {value!r}")
        race = _validation.switch("race", race)
        if problem["attention_factor"] is None:
            learned = "yarn" if method == "evolution" else "search"
            problem = {**problem, "attention_factor": learned}
        if method == "gradient":
            _not_with(f"method={method!r}", {**sizes, "max_evaluations": max_evaluations})
            if race:
                raise ValueError("race: expected False with method='gradient', got True")
        if method == "evolution":
            _not_with(
                f"method={method!r}",
                {**descent, "activation_checkpointing": activation_checkpointing},
            )
            if problem["attention_factor"] == "search":
                raise ValueError(
                    "attention_factor: expected 'yarn', 'su' or a number with method='evolution', "
                    "got 'search', which method='gradient' and 'hybrid' know"
                )
        sizes = _replace(HYBRID_SIZES if method == "hybrid" else PRESETS[preset].sizes, sizes)
        descent = _replace(DescentSettings(), descent)
        samples = PRESETS[preset].samples if samples is None else samples
        samples = _validation.integer("samples", samples, 1)
        seed = _validation.integer("seed", seed, 0)
        batch_size, max_evaluations, last_tokens = (
            None if value is None else _validation.integer(name, value, 1)
            for name, value in (
                ("batch_size", batch_size), ("max_evaluations", max_evaluations),
                ("last_tokens", last_tokens),
            )
        )  # fmt: skip
        critical_dimension = _validation.switch("critical_dimension", problem["critical_dimension"])
        shard_sequence = _validation.switch("shard_sequence", shard_sequence)
        if activation_checkpointing is not None:
            activation_checkpointing = _validation.switch(
                "activation_checkpointing", activation_checkpointing
            )
        evolves = method != "gradient" and sizes.iterations > 1
        if evolves and not sizes.mutations + sizes.crossovers:
            raise ValueError("mutations, crossovers: expected at least 1 of either, got 0 and 0")
        checked = Problem.of(rope, preset=PRESETS[preset], **problem)
        if last_tokens is not None and last_tokens >= checked.target_length:
            raise ValueError(
                f"last_tokens: expected less than the target length {checked.target_length}, "
                f"got {last_tokens}"
            )
        if shard_sequence:
            _check_sharding(ranks, method, checked)
        if objective == "needle":
            _not_with(f"objective={objective!r}", {"last_tokens": last_tokens})
            if checked.target_length < needles.SHORTEST:
                raise ValueError(
                    f"target_length: expected at least {needles.SHORTEST} tokens with "
                    f"objective='needle', got {checked.target_length}"
                )
            last_tokens = needles.ANSWER_TOKENS
        return cls(
            method, objective, last_tokens, checked, sizes, descent,
            activation_checkpointing, samples, seed, batch_size, max_evaluations, race,
            critical_dimension, shard_sequence,
        )  # fmt: skip

    @property
    def has_steps(self) -> bool:
        """Whether the method goes backwards through the model."""
        return self.method != "evolution"

    @property
    def limits(self) -> dict[str, int | None]:
        """How far a search goes: what a resumed one may raise."""
        if self.method == "gradient":
            return {}
        return {"iterations": self.sizes.iterations, "max_evaluations": self.max_evaluations}

    def header(self) -> dict[str, Any]:
        """Return what a resumed search must share, for the journal.

        The first difference is what a refusal names.
        """
        sizes, descent = vars(self.sizes), vars(self.descent)
        by_method = {
            "evolution": {"sizes": {k: v for k, v in sizes.items() if k != "iterations"}},
            "gradient": {"descent": descent},
            "hybrid": {
                "sizes": {**sizes, "max_evaluations": self.max_evaluations},
                "descent": descent,
            },
        }
        return {
            "method": self.method,
            "objective": self.objective,
            "last_tokens": self.last_tokens,
            # None where off, as in the journals of versions that had no such option.
            "race": racing.SETTINGS if self.race else None,
            "critical_dimension": self.critical_dimension or None,
            "problem": dataclasses.asdict(self.problem),
            **by_method[self.method],
            "activation_checkpointing": self.activation_checkpointing,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


#: What people call the parts of a header whose names there are ours.
_MEANT = {
    "data.search:": "search windows, of documents and samples:",
    "data.screen:": "first search windows, of documents and samples:",
    "data.validation:": "validation windows, of documents or validation:",
    "data.documents:": "documents:",
    "problem.space.start_tokens:": "start_tokens:",
    "problem.space.upper:": "max_lambda, in hundredths:",
    "problem.learn_attention:": "attention_factor, learned:",
}


def explain(difference: str) -> str:
    """Return a difference between two headers in the words of `longrope.search`."""
    for name, meant in _MEANT.items():
        if difference.startswith(name):
            return meant + difference.removeprefix(name)
    return difference


def _check_sharding(ranks: int, method: str, problem: Problem) -> None:
    if method != "evolution":
        raise ValueError(
            f"shard_sequence: expected False with method={method!r}, whose steps go backwards "
            "through the model; method='evolution' can"
        )
    if ranks == 1:
        raise ValueError(
            "shard_sequence: expected a torch.distributed job of 2 ranks or more, got 1"
        )
    if problem.target_length < 2 * ranks:
        raise ValueError(
            f"target_length: expected at least {2 * ranks} tokens to shard over {ranks} "
            f"ranks, got {problem.target_length}"
        )


def _replace(settings: Any, given: dict[str, Any]) -> Any:
    return dataclasses.replace(settings, **{k: v for k, v in given.items() if v is not None})


def _not_with(setting: str, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with {setting}, got {value!r}")
