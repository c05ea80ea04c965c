"""What an evaluation shows: a table, a CSV file, plots, and how other suites are run on it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longrope.evaluation.passkey_result import Passkey, Trial, draw_bands
from longrope.runs import style
from longrope.runs.folder import write_table

AS_LOADED = "as loaded"
CSV, PLOT, MAPS = "evaluation.csv", "evaluation.png", "passkey.png"
FILES = (CSV, PLOT, MAPS)
#: What the value of a task is, and how it is written.
_TASKS = {
    "perplexity": ("perplexity", "{:.4f}"),
    "passkey": ("passkey, share of right trials", "{:.2f}"),
    "ruler": ("RULER-synthetic-6, share", "{:.3f}"),
    "longppl": ("LongPPL", "{:.4f}"),
}
#: The shortest length of lm-eval's RULER tasks.
_LEAST_LM_EVAL = 4096


class Figure(NamedTuple):
    """One value with the ends of its 95 % interval; None where there is none.

    `n` counts what the value is a mean of: tokens, trials, samples, key tokens. `detail` holds the
    trials of passkey, the score of each RULER task, or the places of key tokens.
    """

    set: str
    task: str
    length: int
    value: float | None
    low: float | None
    high: float | None
    n: int | None
    detail: Any

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Figure:
        """Make a figure of an entry of the journal."""
        return cls(*(entry[name] for name in cls._fields))

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        form = _TASKS[self.task][1]
        ends = "" if self.low is None else f" ({form} to {form})".format(self.low, self.high)
        return form.format(self.value) + ends


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All figures of a run."""

    figures: tuple[Figure, ...]

    @functools.cached_property
    def sets(self) -> tuple[str, ...]:
        """The names of the sets of factors, the model as loaded first."""
        names = dict.fromkeys(figure.set for figure in self.figures)
        return tuple(sorted(names, key=lambda name: name != AS_LOADED))

    def of(self, task: str, name: str) -> dict[int, Figure]:
        """Return the figures of a task and a set by length."""
        return {f.length: f for f in self.figures if (f.task, f.set) == (task, name)}

    @functools.cached_property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that were run."""
        return tuple(dict.fromkeys(figure.task for figure in self.figures))

    def _tables(self) -> Iterator[list[list[str]]]:
        for task in self.tasks:
            lengths = sorted({f.length for f in self.figures if f.task == task})
            table = [[_TASKS[task][0], *map(str, lengths)]]
            for name in self.sets:
                found = self.of(task, name)
                table.append([name, *(str(found[length]) for length in lengths)])
            yield table

    def __str__(self) -> str:
        blocks = []
        for table in self._tables():
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            blocks += [
                "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                for row in table
            ] + [""]
        return "\n".join(blocks).rstrip()

    def save(self, folder: Path) -> None:
        """Write the table and the plots into a folder."""
        rows = [
            [*figure[:-1], json.dumps(figure.detail) if figure.task == "ruler" else ""]
            for figure in self.figures
        ]
        write_table(folder / CSV, [*Figure._fields[:-1], "parts"], rows)
        self._plot(folder / PLOT)
        if "passkey" in self.tasks:
            self._maps(folder / MAPS)

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure as Canvas

        canvas = Canvas(figsize=(5 * len(self.tasks), 4), layout="constrained")
        for axes, task in zip(canvas.subplots(1, len(self.tasks), squeeze=False)[0], self.tasks,
                              strict=True):  # fmt: skip
            for name, look in zip(self.sets, looks(self.sets), strict=True):
                points = [f for f in self.of(task, name).values() if f.value is not None]
                drawn = [(f.length, f.value) for f in points]
                axes.plot(*zip(*drawn, strict=True) if drawn else ([], []), **look)
                spans = [f for f in points if f.low is not None]
                axes.vlines([f.length for f in spans], [f.low for f in spans],
                            [f.high for f in spans], color=look["color"], alpha=0.4)  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set(xlabel="tokens", ylabel=_TASKS[task][0])
            if task in ("perplexity", "longppl"):
                axes.set_yscale("log")
            else:
                axes.set_ylim(-0.03, 1.03)
            style.tidy(axes)
        axes.legend(frameon=False)
        canvas.savefig(path, dpi=150)

    def _maps(self, path: Path) -> None:
        from matplotlib.figure import Figure as Canvas

        canvas = Canvas(figsize=(4 * len(self.sets), 3.6), layout="constrained")
        for axes, name in zip(canvas.subplots(1, len(self.sets), squeeze=False)[0], self.sets,
                              strict=True):  # fmt: skip
            draw_bands(canvas, axes, self.passkey(name), name)
        canvas.savefig(path, dpi=150)

    def passkey(self, name: str) -> Passkey:
        """Return the passkey trials of a set."""
        found = self.of("passkey", name).values()
        return Passkey(tuple(Trial(*trial) for figure in found for trial in figure.detail))


def looks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return how the curve of each set is drawn: a known name in its own style, others in order."""
    known = {AS_LOADED: "none"} | {name: name for name in style.STYLES}
    used = [known[name] for name in names if name in known]
    rest = iter([name for name in ("gradient", "evolution", "hybrid", *style.STYLES)
                 if name not in used])  # fmt: skip
    drawn = []
    for name in names:
        chosen = known.get(name) or next(rest, "gradient")
        drawn.append(style.line(chosen, label=name))
    return drawn


def other_suites(folder: str, lengths: Sequence[int]) -> str:
    """Return the commands that run lm-eval's RULER and HELMET on an exported folder."""
    least = [length for length in lengths if length >= _LEAST_LM_EVAL] or [_LEAST_LM_EVAL]
    place, longest = shlex.quote(folder), max(least)
    metadata = shlex.quote(json.dumps({"max_seq_lengths": least}))
    return (
        f"lm_eval --model hf --model_args pretrained={place},max_length={longest},dtype=auto "
        f"--tasks ruler --metadata {metadata}\n"
        f"python eval.py --config configs/recall.yaml --model_name_or_path {place} "
        f"--input_max_length {longest}"
    )
