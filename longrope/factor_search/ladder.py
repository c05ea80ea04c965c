"""The ladder: tiers by position, searched one after another from the shortest on.

A tier is a search like any other, by any method, with three differences. It is measured on its own
range of positions alone, behind the tiers below, which are fixed by then. It begins with what the
tier below leads to and with the ramps that were best in the first tier, beside the rules. And what
it costs is the range, since the tokens before it do not depend on the candidate.

At the end YaRN by position, a rule that needs no search, is measured on the same windows: it is
returned where it is better over all ranges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from longrope._numbers import perplexity_of
from longrope.distributed.ranks import Ranks
from longrope.evaluation import needles
from longrope.evaluation.memory import BackwardPlan, cache_bytes, free_memory
from longrope.factor_search.evolution import Proposal
from longrope.factor_search.heads import HeadSearch, heads_of
from longrope.factor_search.heads import most_evaluations as most_by_head
from longrope.factor_search.history import Evaluation, Role, SearchResult
from longrope.factor_search.measurer import Measurer, TierCost
from longrope.factor_search.methods import METHODS, Task, most_evaluations
from longrope.factor_search.options import SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factor_search.ramps import best_shapes
from longrope.factor_search.range_evaluator import RangeEvaluator, RangeGradient
from longrope.factor_search.space import Candidate
from longrope.factor_search.windows import WindowPool, WindowsByRole
from longrope.factors import Tiers
from longrope.factors.tiers import ladder_targets
from longrope.patching import RopeSettings
from longrope.patching.apply import check_windows
from longrope.patching.attention import check_tiered_attention, has_kernel_attention
from longrope.patching.families import decoder
from longrope.patching.wrappers import device_of, dtype_of
from longrope.runs.journal import Replay

#: Prefixes of windows are kept where those of all windows take no more than this share of the
#: memory that is free; else they are computed whenever a window is measured on.
KEPT_SHARE = 0.25
#: Windows that the steps of a tier take turns with, so that each needs its prefix once.
POOL = 24
#: Steps of the last tier, which has half of all tokens, and of those below, in `steps`: so that a
#: ladder takes no more passes than the search of one set.
LAST_STEPS, LOWER_STEPS = 1.5, 0.75
#: The last tier divides its steps among descents at the learning rate times these, and the windows
#: that decide choose among the points of all: one that is twice as long ends no better, and where
#: it ends is a matter of luck by 1 % (docs/search.md).
LAST_SPEEDS = (1.0, 2.0)
#: Ramps that tiers above the first begin with: those that were best in the first. What a tier leads
#: to by a power can be far off: with the packaged model at 8 times the window it was 8 % above the
#: tier's end in perplexity, the best ramp of the first tier 2 %.
RAMPS = 6
#: Names the random windows on which factors by layer and head are found: other ones.
BY_HEAD = (1,)


@dataclass(frozen=True)
class Ladder:
    """Which tiers are searched, and what they have in common.

    Attributes
    ----------
    fixed
        The tiers that the model begins with, which stay as they are.
    problems
        Of the tiers that are searched, in order.
    """

    fixed: Tiers
    problems: tuple[Problem, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        rope: RopeSettings,
        options: SearchOptions,
        problem: Problem,
        fixed: Tiers,
    ) -> Ladder:
        """Put together the tiers up to the target of `problem`.

        Raises `ValueError` with one sentence where the model, the lengths or the objective leave a
        tier without anything to measure.
        """
        if not has_kernel_attention(model):
            raise ValueError(
                "ladder: expected a model whose attention ops.attention can compute, got "
                f"{type(model).__name__} in {dtype_of(model)} on "
                f"{device_of(model).type}"
            )
        check_tiered_attention(decoder(model))
        check_windows(decoder(model), fixed)
        targets = ladder_targets(fixed.limits[-1], problem.target_length)
        begins = [fixed.limits[-1], *targets[:-1]]
        scored = 1
        if options.objective == "needle":
            scored = needles.ANSWER_TOKENS
            if targets[0] < needles.SHORTEST:
                raise ValueError(
                    "objective: expected 'perplexity' for a ladder whose first tier ends at "
                    f"{targets[0]} tokens, got 'needle', which takes {needles.SHORTEST} or more"
                )
        if targets[-1] - begins[-1] <= scored:
            raise ValueError(
                f"target_length: expected more than {begins[-1] + scored} tokens, so that the last "
                f"tier, which begins at {begins[-1]}, has tokens to score, got {targets[-1]}"
            )
        problems = []
        for begin, end in zip(begins, targets, strict=True):
            tier = Problem.of(rope, options, problem.bos, problem.stage, end)
            most = end - begin - 1  # the range's last token predicts none
            last = most if tier.last_tokens is None else min(tier.last_tokens, most)
            problems.append(dataclasses.replace(tier, last_tokens=last))
        return cls(fixed, tuple(problems))

    @property
    def targets(self) -> list[int]:
        """Where the tiers end, in tokens."""
        return [problem.target_length for problem in self.problems]

    def as_fields(self) -> dict[str, Any]:
        """Return what a journal's header says of it."""
        return {"targets": self.targets, "fixed": [tier.as_fields() for tier in self.fixed]}

    def most_evaluations(self, options: SearchOptions, held_out: bool) -> int:
        """Return how many evaluations and steps there are at most."""
        each = [
            most_evaluations(problem, self.options_of(number, options), held_out)
            for number, problem in enumerate(self.problems, 1)
        ]
        each += [
            most_by_head(self.options_of(number, options), held_out)
            for number, _ in enumerate(self.problems, 1)
        ]
        return sum(each) + 2 * len(self.problems)  # and those of YaRN by position

    def options_of(self, number: int, options: SearchOptions) -> SearchOptions:
        """Return the options of a tier, with steps of its own."""
        if not options.has_steps:
            return options
        share = LAST_STEPS if number == len(self.problems) else LOWER_STEPS
        steps = max(1, round(share * options.descent.steps))
        return dataclasses.replace(options, steps=steps)

    def keeps(self, model: nn.Module, windows: WindowsByRole) -> list[bool]:
        """Say of each tier whether the prefixes of all windows are kept."""
        count = POOL + sum(len(w) for role, w in windows.windows.items() if role != Role.SCREEN)
        free = free_memory(device_of(model))
        begins = [self.fixed.limits[-1], *self.targets[:-1]]
        needed = [count * cache_bytes(model, begin, sliding=False) for begin in begins]
        return [free is None or bytes_ <= KEPT_SHARE * free for bytes_ in needed]


@dataclass(frozen=True)
class LadderSearch:
    """Searches the tiers of a ladder; `run` is the search.

    Attributes
    ----------
    model, options, ladder
        What is searched, and how.
    windows
        Of plain text and of the target's length.
    notes
        How windows go through the model, as the journal has it.
    journal, on_batch, ranks
        As for a `Measurer`.
    """

    model: nn.Module
    options: SearchOptions
    ladder: Ladder
    windows: WindowsByRole
    notes: dict[str, Any]
    journal: Replay | None
    on_batch: Callable[[Sequence[Evaluation], int], None]
    ranks: Ranks

    def run(self) -> SearchResult:
        """Search tier after tier; return the better of what was found and YaRN by position."""
        history: list[Evaluation] = []
        searched, yarn = [], []
        below: tuple[Candidate, int] | None = None
        shapes: tuple[tuple[float, float], ...] | None = None  # the first tier compares all
        for number, problem in enumerate(self.ladder.problems, 1):
            problem = dataclasses.replace(problem, below=below, shapes=shapes)
            task = self._task(number, problem, self._tiers(searched))
            chosen = METHODS[self.options.method](task)
            task.measure(Role.SEARCH, [chosen], "finalist")
            searched.append((task, chosen))
            if number == 1:
                shapes = best_shapes(problem, task.measurer.losses(task.few), RAMPS)
            else:
                _forget(task)
            rule = problem.rules()["yarn"]
            other = task if number == 1 else self._task(number, problem, self._tiers(yarn))
            _measure_rule(other, rule, other.judge)
            yarn.append((other, rule))
            _forget(other)
            for done in dict.fromkeys([task.measurer, other.measurer]):
                history += done.history
            factor = problem.factors(chosen).attention_factor
            below = dataclasses.replace(chosen, attention_factor=factor), problem.target_length
        taken = min((searched, yarn), key=lambda rungs: _loss(rungs, rungs[0][0].judge))
        if taken is yarn:
            for task, rule in yarn:
                known = len(task.measurer.history)
                _measure_rule(task, rule, Role.SEARCH)
                history += task.measurer.history[known:]
        tiers = self._tiers(taken)
        held_out = Role.VALIDATION in self.windows.windows
        result = SearchResult(
            factors=tiers[-1],
            perplexity=perplexity_of(_loss(taken, Role.SEARCH)),
            validation_perplexity=(
                perplexity_of(_loss(taken, Role.VALIDATION)) if held_out else None
            ),
            history=tuple(history),
            tiers=tiers,
            stages=self.ladder.problems[-1].stage_parts(tiers[-1]),
        )
        if self.options.per == "model":
            searched[-1][0].measurer.finish()
            return result
        return self._by_head(result)

    def _by_head(self, result: SearchResult) -> SearchResult:
        """Search the factors of layers or heads, from a ladder for all of them on."""
        problems = self.ladder.problems
        return HeadSearch(
            heads_of(self.model, self.options.per),
            lambda number, below: self._task(number, problems[number - 1], below, BY_HEAD),
            len(problems),
            _forget,
        ).run(result)

    def _tiers(self, rungs: Sequence[tuple[Task, Candidate]]) -> Tiers:
        """Return the tiers up to those that are known."""
        return Tiers([*self.ladder.fixed, *(task.problem.factors(c) for task, c in rungs)])

    def _task(
        self, number: int, problem: Problem, below: Tiers, stream: tuple[int, ...] = ()
    ) -> Task:
        """Return what a method works with to search a tier above others.

        `stream` names random numbers of its own.
        """
        end, begin, target = problem.target_length, below.limits[-1], self.ladder.targets[-1]
        seeds = np.random.SeedSequence((self.options.seed, number, *stream)).spawn(3)
        for_method, for_windows, for_needles = map(np.random.default_rng, seeds)
        windows = self.windows.first(
            end, for_needles if self.options.objective == "needle" else None
        )
        rows, keep = self.notes["rows"], self.notes["kept_prefixes"][number - 1]
        chunk = self.notes["chunk"]
        if self.options.batch_size is None:
            rows = rows_of_range(rows, chunk, target, begin, end)
        differentiate = random_windows = None
        if self.options.has_steps:
            differentiate = RangeGradient(
                self.model, problem.unit_inv_freq(), BackwardPlan(*self.notes["gradient"]),
                problem.last_tokens, self.ranks, below, keep,
            )  # fmt: skip
            random_windows = WindowPool(windows.random(for_windows), POOL, for_windows)
        measurer = Measurer(
            RangeEvaluator(
                self.model, problem.factors, rows, problem.last_tokens, chunk, below, keep,
            ),
            windows.windows,
            self.journal,
            max_evaluations=self.options.max_evaluations,
            on_batch=self.on_batch,
            differentiate=differentiate,
            ranks=self.ranks,
            absolute=problem.absolute,
            tier=TierCost(number, begin, end, target, keep),
        )  # fmt: skip
        options = self.ladder.options_of(number, self.options)
        last = number == len(self.ladder.problems)
        speeds = LAST_SPEEDS if last and not stream else (1.0,)
        return Task(problem, options, measurer, for_method, random_windows, speeds)


def rows_of_range(rows: int, chunk: int | None, target: int, begin: int, end: int) -> int:
    """Return the rows of a pass over the tokens `begin` to `end` of windows of `end` tokens.

    `rows` and `chunk` are planned for windows of `target` tokens: no more tokens take part in a
    pass, and no more keys are held.
    """
    held = rows * target // end
    if chunk is None:
        return held
    return min(held, rows * chunk // min(chunk, end - begin))


def _forget(task: Task) -> None:
    """Free the prefixes that a task keeps; what it measures later computes them again."""
    task.measurer.differentiate = None
    task.measurer.evaluator.forget()
    task.measurer.tier.forget()


def _measure_rule(task: Task, rule: Candidate, role: Role) -> None:
    """Measure YaRN by position, unless the search of the tier has."""
    if rule not in task.measurer.losses(role):
        task.measurer.measure([Proposal(rule, "yarn by position", -1)], role)


def _loss(rungs: Sequence[tuple[Task, Candidate]], role: Role) -> float:
    """Return the mean NLL of the tokens that tiers score on the windows of a role."""
    scored = [task.problem.last_tokens for task, _ in rungs]
    losses = [task.measurer.losses(role)[candidate] for task, candidate in rungs]
    return float(np.average(losses, weights=scored))
