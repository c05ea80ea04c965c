"""Algorithm 1 of the paper: evolutionary search with monotone mutation and crossover."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from longrope._validation import count, natural, probability
from longrope.factor_search.space import Candidate, SearchSpace
from longrope.runs.options import Options, about


class Proposal(NamedTuple):
    """A candidate to evaluate, where it came from, and in which iteration."""

    candidate: Candidate
    origin: str
    iteration: int


@dataclass(frozen=True)
class EvolutionSettings(Options):
    """Sizes of Algorithm 1; the defaults are those of the paper (Table 4 and section 3.3).

    `iterations` counts the populations that are evaluated, the first one included, so a search
    makes at most `population + (iterations - 1) * (mutations + crossovers)` evaluations.
    """

    population: int = field(default=64, metadata=about(count))
    mutations: int = field(default=16, metadata=about(natural))
    crossovers: int = field(default=16, metadata=about(natural))
    mutation_probability: float = field(default=0.3, metadata=about(probability))
    iterations: int = field(default=40, metadata=about(count))
    parents: int = field(default=32, metadata=about(count))

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
        The first members of the initial population by name (the closed forms); mutations of them,
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
