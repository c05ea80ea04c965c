"""What an evaluation shows: a table, a CSV file, plots, and how other suites are run on it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longrope.evaluation.passkey_result import Passkey, Trial
from longrope.report import figures as drawing
from longrope.report import plots
from longrope.report.evaluation import AS_LOADED, TASKS, draw_by_length, looks
from longrope.runs.folder import write_table

CSV, PLOT, MAPS = "evaluation.csv", "evaluation.png", "passkey.png"
FILES = (CSV, PLOT, MAPS)
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
        form = f"{{:.{TASKS[self.task][1]}f}}"
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
            table = [[TASKS[task][0], *map(str, lengths)]]
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
        styles = looks(self.sets)
        lengths = sorted({figure.length for figure in self.figures})

        def panel(number: int, axes: Any) -> None:
            task, curves = self.tasks[number], []
            for name, look in zip(self.sets, styles, strict=True):
                points = [f for f in self.of(task, name).values() if f.value is not None]
                curves.append(
                    drawing.Curve(
                        look, [f.length for f in points], [f.value for f in points],
                        [f.low for f in points], [f.high for f in points],
                    )
                )  # fmt: skip
            draw_by_length(axes, task, curves, lengths)

        with drawing.canvas(path, size=drawing.panels_size(len(self.tasks))) as canvas:
            drawing.panels(canvas, len(self.tasks), panel)
            drawing.legend(canvas)

    def _maps(self, path: Path) -> None:
        results = {name: self.passkey(name) for name in self.sets}
        maps = {n: (found.bands(), found.lengths) for n, found in results.items() if found.trials}
        if not maps:
            return
        size = plots.map_size(len(maps), max(len(lengths) for _, lengths in maps.values()))
        with drawing.canvas(path, size=size) as canvas:
            plots.draw_maps(canvas, maps)

    def passkey(self, name: str) -> Passkey:
        """Return the passkey trials of a set."""
        found = self.of("passkey", name).values()
        return Passkey(tuple(Trial(*trial) for figure in found for trial in figure.detail))


def other_suites(folder: str, lengths: Sequence[int]) -> str:
    """Return the commands that run lm-eval's RULER and HELMET on an exported folder.

    lm-eval's twice: as readers know the folder, and with its tiers by position in force.
    """
    least = [length for length in lengths if length >= _LEAST_LM_EVAL] or [_LEAST_LM_EVAL]
    place, longest = shlex.quote(folder), max(least)
    metadata = shlex.quote(json.dumps({"max_seq_lengths": least}))
    ask = f"pretrained={place},max_length={longest},dtype=auto --tasks ruler --metadata {metadata}"
    return (
        f"lm_eval --model hf --model_args {ask}\n"
        f"python -m longrope.evaluation.lm_eval_model --model longrope --model_args {ask}\n"
        f"python eval.py --config configs/recall.yaml --model_name_or_path {place} "
        f"--input_max_length {longest}"
    )
