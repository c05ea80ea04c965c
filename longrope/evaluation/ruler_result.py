"""What `longrope.ruler` has measured: scores, effective lengths, a table, a plot and a CSV file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longrope.report import figures
from longrope.report.intervals import bootstrap_interval, proportion_interval
from longrope.runs.folder import write_table
from longrope.runs.style import STYLES, line

#: NoLiMa's rule (arXiv 2502.05167): a length counts while 85 % of the short score is reached.
SHARE_OF_SHORT = 0.85
#: RULER's own threshold: the average score of Llama-2-7B at 4096 tokens.
RULER_THRESHOLD = 0.856


class Scored(NamedTuple):
    """One prompt of `tokens` tokens and its answer; `score` is from 0 to 1."""

    task: str
    length: int
    tokens: int
    score: float
    references: tuple[str, ...]
    prediction: str


class Score(NamedTuple):
    """A mean of sample scores from 0 to 1, its 95 % interval, and the number of samples.

    The interval is Clopper and Pearson's where samples are right or wrong, else a bootstrap's.
    """

    mean: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> Score:
        """Average the scores of samples."""
        whole = all(score in (0, 1) for score in scores)
        interval = proportion_interval(int(sum(scores)), len(scores)) if whole else None
        return cls(float(np.mean(scores)), *(interval or bootstrap_interval(scores)), len(scores))

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ({100 * self.low:.0f} to {100 * self.high:.0f})"


@dataclasses.dataclass(frozen=True)
class Ruler:
    """The samples of a measurement: RULER-synthetic-6, or some of its tasks."""

    samples: tuple[Scored, ...]
    seed: int = 0

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that were asked for."""
        return tuple(sorted({sample.length for sample in self.samples}))

    @functools.cached_property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(dict.fromkeys(sample.task for sample in self.samples))

    def _scores(self, length: int, task: str | None = None) -> list[float]:
        found = [s.score for s in self.samples if s.length == length and task in (None, s.task)]
        if not found:
            what = "length" if task in (None, *self.tasks) else "task"
            raise ValueError(f"{what}: expected one that was measured, got {(task, length)}")
        return found

    def score(self, task: str, length: int) -> Score:
        """Return the mean score of a task at a length."""
        return Score.of(self._scores(length, task))

    def average(self, length: int) -> Score:
        """Return the mean over all tasks at a length, which have as many samples each."""
        return Score.of(self._scores(length))

    def effective_length(self, threshold: float | None = None) -> int | None:
        """Return the longest length up to which every average reaches a threshold.

        None: 85 % of the average at the shortest length. `RULER_THRESHOLD` is RULER's own. None is
        returned where already the shortest length is below it, or has 0.
        """
        short = self.average(self.lengths[0]).mean
        least = SHARE_OF_SHORT * short if threshold is None else threshold
        reached = None
        for length in self.lengths:
            mean = self.average(length).mean
            if mean < least or mean == 0:
                break
            reached = length
        return reached

    def __str__(self) -> str:
        header = ["task", *map(str, self.lengths)]
        rows = [[task, *(str(self.score(task, n)) for n in self.lengths)] for task in self.tasks]
        rows.append(["average", *(str(self.average(n)) for n in self.lengths)])
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        whole = "RULER-synthetic-6" if len(self.tasks) == 6 else "tasks of RULER-synthetic-6"
        by_rule = self.effective_length(), self.effective_length(RULER_THRESHOLD)
        ours, theirs = (n or "none" for n in by_rule)
        lines.append(
            f"{whole}, scores of 100 (95 % intervals); effective length {ours} tokens by 85 % of "
            f"the shortest one's score, {theirs} by RULER's threshold of 85.6"
        )
        return "\n".join(lines)

    def save_csv(self, path: str | Path) -> None:
        """Write one row for each sample; references are separated by spaces."""
        shown = [
            s._replace(score=f"{s.score:.4f}", references=" ".join(s.references))
            for s in self.samples
        ]
        write_table(path, Scored._fields, shown)

    def plot(self, path: str | Path, title: str = "") -> None:
        """Draw the score of every task, and the average, by length."""
        styles = [style for name, style in STYLES.items() if name != "position"]
        curves = [
            figures.Curve(
                style._asdict() | {"label": task, "linewidth": 1.2, "markersize": 4},
                self.lengths, [100 * self.score(task, n).mean for n in self.lengths],
            )
            for task, style in zip(self.tasks, styles, strict=False)
        ]  # fmt: skip
        means = [100 * self.average(n).mean for n in self.lengths]
        curves.append(figures.Curve(line("position", label="average"), self.lengths, means))
        with figures.canvas(Path(path)) as canvas:
            axes = canvas.subplots()
            figures.draw_curves(axes, curves, log_y=False, far=False)
            axes.set_ylim(-3, 103)
            figures.lengths_axis(axes, self.lengths, "prompt and answer, tokens")
            axes.set(ylabel="score", title=title)
            figures.legend(canvas)
