"""The three methods of a search: how evaluations and steps lead to the factors returned."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longrope.factor_search.descent import Descent, DescentSettings, Point
from longrope.factor_search.evolution import EvolutionSettings, Proposal, evolve
from longrope.factor_search.ledger import Ledger, OutOfBudgetError
from longrope.factor_search.problem import Problem
from longrope.factor_search.racing import Race
from longrope.factor_search.ramps import ramps
from longrope.factor_search.space import STEPS, Candidate
from longrope.factor_search.windows import RandomWindows

#: How many of the best candidates the validation windows choose from, the baselines aside.
FINALISTS = 8
#: Search windows on which starts and start tokens are compared first.
SCREEN_WINDOWS = 2
#: Starts that pass the screen and are compared on all search windows.
STARTS = 4
#: Numbers of start tokens that pass the screen.
START_TOKEN_FINALISTS = 2
#: Nats per token that start tokens must gain on the judging windows. With the packaged model 20 of
#: them gained 0.0002 there and lost 0.002 on other files.
START_TOKEN_GAIN = 0.001
#: A descent that ended worse than it began goes on with this share of its learning rate.
SLOWER = 0.3
#: Digits of a learned attention factor.
ATTENTION_DIGITS = 3

#: Algorithm 1 as the first half of a hybrid search: to find n_hat and a start.
HYBRID_SIZES = EvolutionSettings(population=16, mutations=8, crossovers=8, iterations=5, parents=8)


@dataclass
class Task:
    """What a method works with."""

    problem: Problem
    ledger: Ledger
    sizes: EvolutionSettings
    descent: DescentSettings
    random: np.random.Generator
    random_windows: RandomWindows | None
    race: bool = False

    @property
    def few(self) -> str:
        """The role of the first few search windows."""
        return "screen" if "screen" in self.ledger.windows else "search"

    @property
    def judge(self) -> str:
        """The role of the windows that decide: held-out ones, where there are any."""
        return "validation" if "validation" in self.ledger.windows else "search"

    @property
    def most_evaluations(self) -> dict[str, int]:
        """How many evaluations and steps each method makes at most."""
        held_out = self.judge == "validation"
        seeds, family = len(self.problem.seeds()), len(ramps(self.problem))
        evolved = min(self.sizes.most_evaluations, self.ledger.max_evaluations)
        descent = self.descent.steps + 2 * self.descent.checkpoints + 2
        return {
            "evolution": evolved + (FINALISTS + seeds if held_out else 0),
            "gradient": seeds + family + STARTS + descent + len(self.problem.space.start_tokens)
            + START_TOKEN_FINALISTS + 2,
            "hybrid": family + evolved + descent + 2,
        }  # fmt: skip

    def evolve(self, seeds: dict[str, Candidate]) -> None:
        """Run Algorithm 1 from these seeds, within the budget; the ledger has what it measured."""
        measure = self.ledger.measure
        if self.race:
            windows = len(self.ledger.windows["search"])
            measure = Race(
                self.ledger.measure_stage, self.ledger.block_sums, windows, self.sizes.parents
            )

        def evaluate(proposals: Sequence[Proposal]) -> list[float]:
            return self.ledger.measure_within_budget(proposals, measure)

        with contextlib.suppress(OutOfBudgetError):
            evolve(self.problem.space, seeds, evaluate, self.sizes, self.random)

    def measure(self, role: str, candidates: Iterable[Candidate], origin: str, iteration: int = -1):
        """Return the NLL of candidates by candidate; what the role knows is not measured again."""
        known = self.ledger.losses(role)
        names = {candidate: name for name, candidate in self.problem.seeds().items()}
        candidates = list(dict.fromkeys(candidates))
        fresh = [c for c in candidates if c not in known]
        proposals = [Proposal(c, names.get(c, origin), iteration) for c in fresh]
        known.update(zip(fresh, self.ledger.measure(proposals, role), strict=True))
        return {c: known[c] for c in candidates}


def evolution(task: Task) -> Candidate:
    """Algorithm 1; the validation windows choose among the best and the baselines."""
    task.evolve(task.problem.seeds())
    searched = task.ledger.losses("search")
    ranked = _ranked(searched)
    if task.judge == "search":
        return ranked[0]
    seeds = [c for c in task.problem.seeds().values() if c in searched]
    finalists = [c for c in ranked if c not in seeds][:FINALISTS]
    return _best(task.measure("validation", [*finalists, *seeds], "finalist"))


def gradient(task: Task) -> Candidate:
    """A descent from the best of the baselines and of a family of ramps, then a sweep of n_hat."""
    family = [*task.problem.seeds().values(), *ramps(task.problem)]
    screened = _ranked(task.measure(task.few, family, "ramp", 0))
    yarn = task.problem.seeds()["yarn"]
    starts = task.measure("search", [*screened[:STARTS], yarn], "ramp", 0)
    chosen, loss = _descended(task, starts)
    variants = [
        dataclasses.replace(chosen, start_tokens=n) for n in task.problem.space.start_tokens
    ]
    screened = task.measure(task.few, [chosen, *variants], "start tokens")
    better = [c for c in _ranked(screened) if screened[c] < screened[chosen]]
    judged = task.measure(task.judge, better[:START_TOKEN_FINALISTS], "start tokens")
    return _best({chosen: loss - START_TOKEN_GAIN, **judged})


def hybrid(task: Task) -> Candidate:
    """A short Algorithm 1, which also sees the best ramp, for n_hat and a start; then a descent."""
    ramp = _best(task.measure(task.few, ramps(task.problem), "ramp", 0))
    task.evolve({**task.problem.seeds(), "ramp": ramp})
    chosen, loss = _descended(task, task.ledger.losses("search"))
    plain = dataclasses.replace(chosen, start_tokens=task.problem.space.start_tokens[0])
    judged = task.measure(task.judge, [plain, task.problem.seeds()["yarn"]], "start tokens")
    # Without start tokens where these gain next to nothing, and never worse than YaRN.
    return plain if judged[plain] <= min(loss + START_TOKEN_GAIN, *judged.values()) else chosen


METHODS = {"evolution": evolution, "gradient": gradient, "hybrid": hybrid}


def _descended(task: Task, starts: dict[Candidate, float]) -> tuple[Candidate, float]:
    """Descend from the best start in the space, return the best point on the way and its NLL.

    `starts` have their NLL on the search windows. The points are put on the grid before they are
    measured, so the factors that are returned are the ones that were. Where one is worse on the
    search windows than the best so far, the descent goes back to that and on with smaller steps.
    The best start and YaRN are judged with the points, also where they lie outside of the space.

    The descent sees the free log lambdas alone, from which all others follow by a matrix; its
    transpose brings the gradient back.
    """
    problem, settings, space = task.problem, task.descent, task.problem.space
    best_start = _best(starts)
    inside = {c: loss for c, loss in starts.items() if c in space}
    start = _best(inside) if inside else space.snap(best_start.lambdas, best_start.start_tokens)
    free = space.free(start)
    descent = Descent(
        1 / np.maximum(1, (free * problem.turns()[:, None]).max(axis=0)),
        space.upper / STEPS,
        settings,
        problem.attention_factor,
        problem.learn_attention,
        space.least / STEPS,
    )

    def all_pairs(point: Point) -> Point:
        return Point(free @ point.log_lambdas, point.attention_factor)

    def loss_and_gradient(point: Point, step: int) -> tuple[float, np.ndarray]:
        windows = task.random_windows.draw(settings.windows_per_step)
        loss, gradient = task.ledger.step(all_pairs(point), step, start.start_tokens, windows)
        return loss, np.append(free.T @ gradient[:-1], gradient[-1])

    best = Point(np.log(start.lambdas[-free.shape[1] :]), problem.attention_factor)
    slow = 1.0
    least = task.measure("search", [start], "start")[start]
    kept = [problem.seeds()["yarn"], best_start, start]
    for steps in settings.segments:
        point = descent.run(best, loss_and_gradient, steps, slow)
        candidate = space.snap_like(all_pairs(point).lambdas, start)
        if problem.learn_attention:
            factor = round(point.attention_factor, ATTENTION_DIGITS)
            candidate = dataclasses.replace(candidate, attention_factor=factor)
        loss = task.measure("search", [candidate], "gradient", steps.stop)[candidate]
        if loss < least:
            best, least = point, loss
            kept.append(candidate)
        else:
            slow *= SLOWER
    judged = task.measure(task.judge, kept, "finalist")
    chosen = _best(judged)
    return chosen, judged[chosen]


def _ranked(losses: dict[Candidate, float]) -> list[Candidate]:
    return sorted(losses, key=losses.__getitem__)


def _best(losses: dict[Candidate, float]) -> Candidate:
    return min(losses, key=losses.__getitem__)
