"""Algorithm 1 on losses whose optimum is known."""

import numpy as np
import pytest

from longrope.factor_search.evolution import EvolutionSettings, evolve
from longrope.factor_search.space import SearchSpace

SPACE = SearchSpace(dims=12, upper=1000)
SEEDS = {
    "pi": SPACE.snap([8.0] * 12),
    "ntk": SPACE.snap(8.0 ** (np.arange(12) / 11)),
    "yarn": SPACE.snap([1.0] * 4 + [1.5, 2.5, 4, 6] + [8.0] * 4),
}
TARGET = SPACE.snap([1.0, 1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 5.0, 7.0, 8.5, 9.0, 9.5], 16)


def distance(candidate):
    """A smooth loss with its optimum at TARGET, start tokens included."""
    gap = np.log(candidate.hundredths) - np.log(TARGET.hundredths)
    return float((gap**2).sum() + 0.05 * (candidate.start_tokens != TARGET.start_tokens))


class Recorder:
    def __init__(self, loss=distance):
        self.loss = loss
        self.calls = []

    def __call__(self, proposals):
        self.calls.append(list(proposals))
        return [self.loss(p.candidate) for p in proposals]

    @property
    def proposals(self):
        return [p for call in self.calls for p in call]


def run(settings=EvolutionSettings(), seed=0, loss=distance):  # noqa: B008 (frozen)
    recorder = Recorder(loss)
    parents = evolve(SPACE, SEEDS, recorder, settings, np.random.default_rng(seed))
    return parents, recorder


@pytest.mark.parametrize("seed", range(3))
def test_finds_a_known_optimum(seed):
    parents, _ = run(seed=seed)
    assert distance(parents[0]) < 0.1 * min(map(distance, SEEDS.values()))
    assert parents[0].start_tokens == TARGET.start_tokens


def test_paper_defaults_and_the_number_of_evaluations():
    settings = EvolutionSettings()
    assert settings == EvolutionSettings(64, 16, 16, 0.3, 40, 32)
    _, recorder = run()
    assert len(recorder.calls) == 40
    assert [p.iteration for p in recorder.calls[0]] == [0] * len(recorder.calls[0])
    assert len(recorder.proposals) <= settings.most_evaluations == 64 + 39 * 32
    assert len(recorder.proposals) > 0.9 * settings.most_evaluations
    origins = [p.origin for p in recorder.calls[0]]
    assert origins[:3] == ["pi", "ntk", "yarn"]
    assert set(origins[3:]) == {"mutation"}
    assert {p.origin for p in recorder.calls[1]} == {"mutation", "crossover"}


def test_every_candidate_is_in_the_space_and_asked_for_once():
    _, recorder = run()
    candidates = [p.candidate for p in recorder.proposals]
    assert all(candidate in SPACE for candidate in candidates)
    assert len(set(candidates)) == len(candidates)


def test_the_best_is_never_lost_and_parents_are_the_best_seen():
    settings = EvolutionSettings(iterations=15, parents=8)
    parents, recorder = run(settings)
    losses = [distance(p.candidate) for p in recorder.proposals]
    assert [distance(c) for c in parents] == sorted(losses)[:8]


def test_equal_random_states_give_equal_runs():
    first, a = run(seed=7)
    second, b = run(seed=7)
    _, c = run(seed=8)
    assert first == second
    assert a.calls == b.calls
    assert a.calls != c.calls


def test_children_come_from_the_parents():
    """With mutation only and one parent, each child differs from that parent by redrawn factors."""
    settings = EvolutionSettings(population=3, crossovers=0, mutations=4, parents=1, iterations=2)
    _, recorder = run(settings)
    best = min((p.candidate for p in recorder.calls[0]), key=distance)
    for proposal in recorder.calls[1]:
        same = np.mean(np.array(proposal.candidate.hundredths) == best.hundredths)
        assert same > 0.2


def test_infinite_losses_rank_last():
    def some_fail(candidate):
        return float("inf") if candidate.start_tokens > 64 else distance(candidate)

    parents, _ = run(EvolutionSettings(iterations=8), loss=some_fail)
    assert all(np.isfinite(some_fail(c)) for c in parents)


def test_an_exception_of_the_measurement_passes_through():
    class Stop(Exception): ...

    def stop(proposals):
        raise Stop

    with pytest.raises(Stop):
        evolve(SPACE, SEEDS, stop, EvolutionSettings(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"population": 0}, "population: expected an integer of at least 1, got 0"),
        ({"mutations": -1}, "mutations: expected an integer of at least 0, got -1"),
        ({"iterations": 1.5}, "iterations: expected an integer of at least 1, got 1.5"),
        ({"parents": True}, "parents: expected an integer of at least 1, got True"),
        ({"mutation_probability": 0}, "mutation_probability: expected 0 < p <= 1, got 0"),
        ({"mutation_probability": 1.1}, "mutation_probability: expected 0 < p <= 1, got 1.1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        EvolutionSettings(**changes)
