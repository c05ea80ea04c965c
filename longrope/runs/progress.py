"""The progress bar of a long run, on standard error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(
    total: int,
    measure: str,
    clock: Callable[[], float] = time.monotonic,
    *,
    shown: bool = True,
) -> Iterator[Callable[[int, int, str | None], None]]:
    """Show units of work done, the latest value of a measure, tokens per second, time so far, left.

    Yields a function of the units done since the last call, the tokens computed for them (0 where
    they came from a journal) and the value of `measure` to show from now on (None: as before). The
    speed is the mean since the bar appeared. `total` is the most units that there can be: where the
    run ends earlier, the bar ends full. Where it is not to be `shown`, the function does nothing.
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

    computed, started = 0, clock()
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
        console=Console(stderr=True),  # results go to standard output
    ) as progress:
        task = progress.add_task("", total=total, value="-", speed="-")

        def update(done: int, tokens: int, value: str | None) -> None:
            nonlocal computed
            computed += tokens
            fields = {} if value is None else {"value": value}
            if computed:
                fields["speed"] = f"{computed / max(clock() - started, 1e-9) / 1000:.1f}k"
            progress.update(task, advance=done, **fields)

        yield update
        progress.update(task, total=progress.tasks[0].completed)
