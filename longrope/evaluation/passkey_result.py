"""What `longrope.passkey` has measured: figures, a table, a heat map and a CSV file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longrope.report import figures, plots
from longrope.report.intervals import proportion_interval
from longrope.report.passkey import bands
from longrope.runs.folder import write_table


class Trial(NamedTuple):
    """One prompt.

    `length` is what was asked for and `tokens` what the prompt has with its answer; `depth` is the
    share of the filler before the key; `nll` is the mean over the key's tokens, nats.
    """

    length: int
    tokens: int
    depth: float
    key: str
    right: bool
    nll: float


class Accuracy(NamedTuple):
    """How many trials were right, and the 95 % interval of the share (Clopper and Pearson)."""

    right: int
    trials: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """The share of right trials."""
        return self.right / self.trials

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Accuracy:
        """Count outcomes."""
        right = sum(outcomes)
        return cls(right, len(outcomes), *proportion_interval(right, len(outcomes)))

    def __str__(self) -> str:
        return f"{self.right}/{self.trials} ({self.low:.0%} to {self.high:.0%})"


@dataclasses.dataclass(frozen=True)
class Passkey:
    """The trials of a measurement. By chance a key of five digits is right once in 100,000."""

    trials: tuple[Trial, ...]
    protocol: str = "longrope"
    seed: int = 0

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that were asked for."""
        return tuple(sorted({trial.length for trial in self.trials}))

    def at(self, length: int) -> list[Trial]:
        """Return the trials of a length; `ValueError` where there is none."""
        found = [trial for trial in self.trials if trial.length == length]
        if not found:
            listed = ", ".join(map(str, self.lengths))
            raise ValueError(f"length: expected one of {listed}, got {length}")
        return found

    def accuracy(self, length: int) -> Accuracy:
        """Return how many trials of a length were right."""
        return Accuracy.of([trial.right for trial in self.at(length)])

    def nll(self, length: int) -> float:
        """Return the mean NLL of the keys' tokens at a length, nats per token."""
        return float(np.mean([trial.nll for trial in self.at(length)]))

    def bands(self) -> np.ndarray:
        """Return the share of right trials by band of depth and length; NaN where there is none.

        float64 `[10, lengths]`, the shallowest band first.
        """
        return bands([(trial.length, trial.depth, trial.right) for trial in self.trials])[0]

    def __str__(self) -> str:
        lines = ["length  right (95 % interval)    NLL of the key, nats per token"]
        for length in self.lengths:
            sizes = [trial.tokens for trial in self.at(length)]
            short = f"  ({min(sizes)} tokens or more)" if min(sizes) < length else ""
            lines.append(
                f"{length:<7d} {self.accuracy(length)!s:<25s} {self.nll(length):.4f}{short}"
            )
        return "\n".join(lines)

    def save_csv(self, path: str | Path) -> None:
        """Write one row for each trial."""
        shown = [
            t._replace(depth=f"{t.depth:.4f}", right=int(t.right), nll=f"{t.nll:.6f}")
            for t in self.trials
        ]
        write_table(path, Trial._fields, shown)

    def plot(self, path: str | Path, title: str = "") -> None:
        """Draw the share of right trials by depth and length into a PNG, PDF or SVG file."""
        size = plots.map_size(1, len(self.lengths))
        with figures.canvas(Path(path), size=size) as canvas:
            plots.draw_map(canvas.subplots(), self.bands(), self.lengths, title)
