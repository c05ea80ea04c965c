"""Algorithm 1 of the paper: evolutionary search with monotone mutation and crossover."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from longrope import _validation
from longrope.factor_search.space import Candidate, SearchSpace


@dataclass(frozen=True)
class Proposal:
    """A candidate to evaluate, where it came from, and in which iteration."""

    candidate: Candidate
    origin: str
    iteration: int


@dataclass(frozen=True)
class EvolutionSettings:
    """Sizes of Algorithm 1; the defaults are those of the paper (Table 4 and section 3.3).

    `iterations` counts the populations that are evaluated, the first one included, so a search
    makes at most `population + (iterations - 1) * (mutations + crossovers)` evaluations.
    """

    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    mutation_probability: float = 0.3
    iterations: int = 40
    parents: int = 32

    def __post_init__(self):
        for name in ("population", "mutations", "crossovers", "iterations", "parents"):
            least = 0 if name in ("mutations", "crossovers") else 1
            # What is kept is Python's own number, which JSON can write.
            object.__setattr__(self, name, _validation.integer(name, getattr(self, name), least))
        probability = self.mutation_probability
        if not isinstance(probability, numbers.Real) or not 0 < probability <= 1:
            raise ValueError(f"mutation_probability: expected 0 < p <= 1, got {probability!r}")
        object.__setattr__(self, "mutation_probability", float(probability))

    @property
    def most_evaluations(self) -> int:
        """The number of evaluations if no child repeats an earlier candidate."""
        return self.population + (self.iterations - 1) * (self.mutations + self.crossovers)


def evolve(
    space: SearchSpace,
    seeds: Mapping[str, Candidate],
    evaluate: Callable[[Sequence[Proposal]], Sequence[float]],
    settings: EvolutionSettings,
    random: np.random.Generator,
) -> list[Candidate]:
    """Run Algorithm 1 and return the surviving parents, best first.

    Parameters
    ----------
    space
        The bounds; every child lies in it.
    seeds
        The first members of the initial population by name (PI, NTK and YaRN); mutations of them,
        taken in turn, fill it up.
    evaluate
        Returns the loss of each proposal (lower is better). Called once per iteration with the
        candidates that were never evaluated before; the same candidate is never asked for twice.
    settings
        Sizes and probability.
    random
        The only source of randomness, so equal states and losses give equal results.
    """
    losses: dict[Candidate, float] = {}
    population = _initial_population(space, seeds, settings, random)
    parents: list[Candidate] = []
    for iteration in range(settings.iterations):
        fresh: dict[Candidate, Proposal] = {}
        for proposal in population:
            if proposal.candidate not in losses:
                fresh.setdefault(proposal.candidate, proposal)
        if fresh:
            losses.update(zip(fresh, evaluate(list(fresh.values())), strict=True))
        members = dict.fromkeys([*parents, *(p.candidate for p in population)])
        # Stable: of equal losses the earlier one stays.
        parents = sorted(members, key=losses.__getitem__)[: settings.parents]
        population = _children(space, parents, iteration + 1, settings, random)
    return parents


def _initial_population(
    space: SearchSpace,
    seeds: Mapping[str, Candidate],
    settings: EvolutionSettings,
    random: np.random.Generator,
) -> list[Proposal]:
    population = [Proposal(candidate, name, 0) for name, candidate in seeds.items()]
    origins = list(seeds.values())
    for index in range(settings.population - len(population)):
        parent = origins[index % len(origins)]
        child = space.mutate(parent, settings.mutation_probability, random)
        population.append(Proposal(child, "mutation", 0))
    return population


def _children(
    space: SearchSpace,
    parents: Sequence[Candidate],
    iteration: int,
    settings: EvolutionSettings,
    random: np.random.Generator,
) -> list[Proposal]:
    children = []
    for _ in range(settings.mutations):
        parent = parents[random.integers(len(parents))]
        child = space.mutate(parent, settings.mutation_probability, random)
        children.append(Proposal(child, "mutation", iteration))
    for _ in range(settings.crossovers):
        # Two different parents, where there are two.
        first, second = random.choice(len(parents), 2, replace=len(parents) < 2)
        child = space.crossover(parents[first], parents[second], random)
        children.append(Proposal(child, "crossover", iteration))
    return children
