"""The progress of a long run, on standard error: a bar, or lines where nothing can be redrawn."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator

#: Seconds between two lines of a log: a run of hours fills no screens, a watcher need not wonder.
_EVERY = 30.0


@contextlib.contextmanager
def bar(
    total: int,
    measure: str,
    clock: Callable[[], float] = time.monotonic,
    *,
    unit: str = "measured",
    ends_with_line: bool = True,
    shown: bool = True,
) -> Iterator[Callable[[int, int, str | None], None]]:
    """Show units of work done, the latest value of a measure, tokens per second, time so far, left.

    Yields a function of the units done since the last call, the tokens computed for them (0 where
    they came from a journal) and the value of `measure` to show from now on (None: as before). The
    speed is the mean since the bar appeared. `total` is the most units that there can be: where the
    run ends earlier, the bar ends full.

    On a terminal this is a bar, and in a notebook with ipywidgets. Elsewhere (a log, a notebook
    without them) it is a line every half minute, with `unit` behind the numbers; and the bar's last
    state as a line at the end, unless `ends_with_line` is False. Where it is not to be `shown`,
    the function does nothing.
    """
    if not shown:
        yield lambda done, tokens, value: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)  # results go to standard output
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    draws = console.is_terminal or widgets
    hidden = not draws and (console.is_jupyter or not ends_with_line)
    computed, done_so_far, started = 0, 0, clock()
    said = started
    with Progress(
        BarColumn(bar_width=None),  # the rest of the line: what is left of 80 columns is little
        MofNCompleteColumn(),
        TextColumn(f"{measure} {{task.fields[value]}}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("+"),
        TimeRemainingColumn(),
        TextColumn("left"),
        speed_estimate_period=120,
        console=console,
        disable=hidden,
    ) as progress:
        task = progress.add_task("", total=total, value="-", speed="-")

        def update(done: int, tokens: int, value: str | None) -> None:
            nonlocal computed, done_so_far, said
            computed += tokens
            done_so_far += done
            fields = {} if value is None else {"value": value}
            if computed:
                fields["speed"] = f"{computed / max(clock() - started, 1e-9) / 1000:.1f}k"
            progress.update(task, advance=done, **fields)
            now = clock()
            if not draws and now - said >= _EVERY:
                said = now
                shown = progress.tasks[0].fields
                left = (now - started) / max(done_so_far, 1) * max(total - done_so_far, 0)
                print(
                    f"longrope: {done_so_far} of {total} {unit}, {measure} {shown['value']}, "
                    f"{shown['speed']} tokens/s, {_time(now - started)} so far, at most "
                    f"{_time(left)} left",
                    file=sys.stderr,
                    flush=True,
                )

        yield update
        progress.update(task, total=progress.tasks[0].completed)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
