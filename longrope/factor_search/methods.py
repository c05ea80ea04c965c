"""The three methods of a search: how evaluations and steps lead to the factors returned."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longrope.factor_search.descent import Descent, Point
from longrope.factor_search.evolution import Proposal, evolve
from longrope.factor_search.history import Role
from longrope.factor_search.measurer import Measurer, OutOfBudgetError
from longrope.factor_search.options import SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factor_search.racing import Race
from longrope.factor_search.ramps import ramps
from longrope.factor_search.space import STEPS, Candidate
from longrope.factor_search.windows import RandomWindows, WindowPool

#: How many of the best candidates the validation windows choose from, besides the baselines.
FINALISTS = 8
#: Search windows on which starts and start tokens are compared first.
SCREEN_WINDOWS = 2
#: Starts that pass the screen and are compared on all search windows.
STARTS = 4
#: Numbers of start tokens that pass the screen.
START_TOKEN_FINALISTS = 2
#: Nats per token that start tokens must gain on the deciding windows. With the packaged model 20
#: start tokens gained 0.0002 there and lost 0.002 on other files.
START_TOKEN_GAIN = 0.001
#: Digits of a learned attention factor.
ATTENTION_DIGITS = 3


@dataclass(frozen=True)
class Task:
    """What a method works with."""

    problem: Problem
    options: SearchOptions
    measurer: Measurer
    random: np.random.Generator
    #: The windows of steps; None with `"evolution"`, which makes none.
    random_windows: RandomWindows | WindowPool | None = None
    #: The descents of a ladder's tier, which share its steps, by what multiplies the learning rate.
    speeds: tuple[float, ...] = (1.0,)

    @property
    def few(self) -> Role:
        """The role of the first few search windows."""
        return Role.SCREEN if Role.SCREEN in self.measurer.windows else Role.SEARCH

    @property
    def judge(self) -> Role:
        """The role of the windows that decide: held-out ones, where there are any."""
        return Role.VALIDATION if Role.VALIDATION in self.measurer.windows else Role.SEARCH

    def evolve(self, seeds: dict[str, Candidate]) -> None:
        """Run Algorithm 1 from these seeds, within the budget; `measurer` keeps the results."""
        measure, sizes = self.measurer.measure, self.options.sizes
        if self.options.race:
            windows = len(self.measurer.windows[Role.SEARCH])
            measure = Race(
                self.measurer.measure_stage, self.measurer.block_sums, windows, sizes.parents
            )

        def evaluate(proposals: Sequence[Proposal]) -> list[float]:
            return self.measurer.measure_within_budget(proposals, measure)

        with contextlib.suppress(OutOfBudgetError):
            evolve(self.problem.space, seeds, evaluate, sizes, self.random)

    def measure(
        self, role: Role, candidates: Iterable[Candidate], origin: str, iteration: int = -1
    ) -> dict[Candidate, float]:
        """Return the NLL of each candidate; one that was measured in this role is not again."""
        known = self.measurer.losses(role)
        named = {**self.problem.seeds(), **self.problem.rules()}
        # Two rules can be the same factors: the first gives the name.
        names = {candidate: name for name, candidate in reversed(named.items())}
        candidates = list(dict.fromkeys(candidates))
        fresh = [c for c in candidates if c not in known]
        proposals = [Proposal(c, names.get(c, origin), iteration) for c in fresh]
        known.update(zip(fresh, self.measurer.measure(proposals, role), strict=True))
        return {c: known[c] for c in candidates}


def evolution(task: Task) -> Candidate:
    """Algorithm 1; the validation windows choose among the best and the baselines."""
    task.evolve(task.problem.seeds())
    # Rules from the base lie outside the space of a stage: they compete at the end alone.
    outside = [c for c in task.problem.rules().values() if c.from_base]
    searched = task.measurer.losses(Role.SEARCH)
    if task.judge == Role.SEARCH:
        searched.update(task.measure(Role.SEARCH, outside, "finalist"))
    ranked = _ranked(searched)
    if task.judge == Role.SEARCH:
        return ranked[0]
    seeds = [*(c for c in task.problem.seeds().values() if c in searched), *outside]
    finalists = [c for c in ranked if c not in seeds][:FINALISTS]
    return _best(task.measure(Role.VALIDATION, [*finalists, *seeds], "finalist"))


def gradient(task: Task) -> Candidate:
    """A descent from the best closed form or the best of a family of ramps; a sweep of n_hat."""
    rules = task.problem.rules()
    family = [*task.problem.seeds().values(), *rules.values(), *ramps(task.problem)]
    screened = _ranked(task.measure(task.few, family, "ramp", 0))
    best_rule = next(c for c in screened if c in rules.values())
    starts = [*screened[:STARTS], best_rule, rules["yarn"]]
    starts = task.measure(Role.SEARCH, starts, "ramp", 0)
    chosen, loss = _descended(task, starts)
    numbers = task.problem.space.start_tokens
    if task.problem.below is not None:  # a sweep like that of the tier below gained nothing
        numbers = (numbers[0], task.problem.below[0].start_tokens)
    variants = [dataclasses.replace(chosen, start_tokens=n) for n in numbers]
    screened = task.measure(task.few, [chosen, *variants], "start tokens")
    better = [c for c in _ranked(screened) if screened[c] < screened[chosen]]
    judged = task.measure(task.judge, better[:START_TOKEN_FINALISTS], "start tokens")
    return _best({chosen: loss - START_TOKEN_GAIN, **judged})


def hybrid(task: Task) -> Candidate:
    """A short Algorithm 1, which also sees the best ramp, for n_hat and a start; then a descent."""
    seeds = task.problem.seeds()
    if family := ramps(task.problem):
        seeds["ramp"] = _best(task.measure(task.few, family, "ramp", 0))
    task.evolve(seeds)
    chosen, loss = _descended(task, task.measurer.losses(Role.SEARCH))
    plain = dataclasses.replace(chosen, start_tokens=task.problem.space.start_tokens[0])
    own = task.measure(task.judge, [plain], "start tokens")[plain]
    judged = task.measurer.losses(task.judge)
    rules = [judged[c] for c in task.problem.rules().values() if c in judged]
    # Without start tokens where these gain next to nothing, and never worse than the rules.
    return plain if own <= min(loss + START_TOKEN_GAIN, *rules) else chosen


METHODS = {"evolution": evolution, "gradient": gradient, "hybrid": hybrid}


def most_evaluations(problem: Problem, options: SearchOptions, held_out: bool) -> int:
    """Return how many evaluations and steps the method makes at most.

    `held_out` says whether there are validation windows.
    """
    seeds = len({*problem.seeds().values(), *problem.rules().values()})
    family = len(ramps(problem))
    first = max(0, len(problem.seeds()) - options.sizes.population)  # all seeds are in it
    evolved = options.sizes.most_evaluations + first
    evolved = min(evolved, options.max_evaluations or sys.maxsize)
    descent = options.descent.steps + 2 * options.descent.checkpoints + 2
    return {
        "evolution": evolved + (FINALISTS + seeds if held_out else 0),
        "gradient": seeds + family + STARTS + descent + len(problem.space.start_tokens)
        + START_TOKEN_FINALISTS + 4,
        "hybrid": family + evolved + descent + 3,
    }[options.method]  # fmt: skip


def _descended(task: Task, starts: dict[Candidate, float]) -> tuple[Candidate, float]:
    """Descend from the best start in the space; return the best point on the way and its NLL.

    `starts` have their NLL on the search windows. Points are put on the grid before they are
    measured, so exactly what is returned was measured. Where a point is worse on the search windows
    than the best so far, the descent goes back to the best and continues with smaller steps. Not so
    in a ladder, where a window costs its range alone: all points go to the deciding windows, which
    are more. The few search windows turned down points that were better on other text.
    The deciding windows compare the points with the best start, the best closed form and YaRN, even
    if these lie outside the space.

    The descent works on the free log lambdas alone. A matrix gives all others, and its transpose
    the gradient by the free ones.
    """
    problem, settings, space = task.problem, task.options.descent, task.problem.space
    settings = dataclasses.replace(settings, steps=max(1, settings.steps // len(task.speeds)))
    best_start = _best(starts)
    inside = {c: loss for c, loss in starts.items() if c in space}
    start = _best(inside) if inside else space.snap(
        problem.on_stage(best_start), best_start.start_tokens
    )  # fmt: skip
    factor = problem.factors(start).attention_factor
    free = space.free(start)
    descent = Descent(
        1 / np.maximum(1, (free * problem.turns()[:, None]).max(axis=0)),
        space.upper / STEPS,
        settings,
        factor,
        problem.learn_attention,
        space.least / STEPS,
    )

    def all_pairs(point: Point) -> Point:
        return Point(free @ point.log_lambdas, point.attention_factor)

    def loss_and_gradient(point: Point, step: int) -> tuple[float, np.ndarray]:
        windows = task.random_windows.draw(settings.windows_per_step)
        loss, gradient = task.measurer.step(all_pairs(point), step, start.start_tokens, windows)
        return loss, np.append(free.T @ gradient[:-1], gradient[-1])

    def on_grid(point: Point) -> Candidate:
        candidate = space.snap_like(all_pairs(point).lambdas, start)
        if not problem.learn_attention:
            return candidate
        factor = round(point.attention_factor, ATTENTION_DIGITS)
        return dataclasses.replace(candidate, attention_factor=factor)

    best = Point(np.log(start.lambdas[-free.shape[1] :]), factor)
    rules = problem.rules()
    measured = {c: starts[c] for c in rules.values() if c in starts}
    kept = [rules["yarn"], *([_best(measured)] if measured else []), best_start, start]
    if task.measurer.tier is not None:
        for number, speed in enumerate(task.speeds):
            before = number * settings.steps
            points = descent.averages(
                best, lambda point, step, n=before: loss_and_gradient(point, n + step), speed
            )
            for steps, candidate in zip(settings.segments, map(on_grid, points), strict=True):
                task.measure(task.judge, [candidate], "gradient", before + steps.stop)
                kept.append(candidate)
    else:

        def loss_of(candidate: Candidate, steps: int) -> float:
            return task.measure(Role.SEARCH, [candidate], "gradient", steps)[candidate]

        least = task.measure(Role.SEARCH, [start], "start")[start]
        better = descent.halting(best, loss_and_gradient, on_grid, loss_of, least)
        kept += [candidate for candidate, _ in better]
    judged = task.measure(task.judge, kept, "finalist")
    chosen = _best(judged)
    return chosen, judged[chosen]


def _ranked(losses: dict[Candidate, float]) -> list[Candidate]:
    return sorted(losses, key=losses.__getitem__)


def _best(losses: dict[Candidate, float]) -> Candidate:
    return min(losses, key=losses.__getitem__)
