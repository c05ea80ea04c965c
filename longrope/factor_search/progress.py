"""The progress bar of a search."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence

from longrope.factor_search.history import Evaluation


@contextlib.contextmanager
def progress_bar(
    show: bool | Callable[[Sequence[Evaluation]], None],
    total: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[Sequence[Evaluation], int], None]]:
    """Show evaluations done, the best perplexity, tokens per second, the time so far and left.

    Yields the function to call with new evaluations and the tokens that were measured for them: 0
    where they came from a journal. The speed is that of all such tokens since the begin.

    A function in place of `show` is called with the evaluations instead, and nothing is shown.

    `total` is the most evaluations that the search can make: candidates that repeat cost nothing,
    so it may end earlier. A candidate in a race counts once, when it is first measured.
    """
    if callable(show):
        yield lambda evaluations, tokens: show(evaluations)
        return
    if not show:
        yield lambda evaluations, tokens: None
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

    best, measured, raced = math.inf, 0, set()
    begin = clock()
    with Progress(
        BarColumn(bar_width=None),  # the rest of the line: what is left of 80 columns is little
        MofNCompleteColumn(),
        TextColumn("perplexity {task.fields[best]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("+"),
        TimeRemainingColumn(),
        TextColumn("left"),
        speed_estimate_period=120,
        console=Console(stderr=True),  # results go to standard output
    ) as progress:
        task = progress.add_task("search", total=total, best="-", speed="-")

        def update(evaluations: Sequence[Evaluation], tokens: int) -> None:
            nonlocal best, measured
            measured += tokens
            if evaluations[0].role == "search":
                best = min(best, *(e.perplexity for e in evaluations))
                progress.update(task, best=f"{best:.4f}")
            if measured:
                speed = measured / max(clock() - begin, 1e-9)
                progress.update(task, speed=f"{speed / 1000:.1f}k")
            again = sum(e.role in ("race", "search") and _factors(e) in raced for e in evaluations)
            raced.update(_factors(e) for e in evaluations if e.role == "race")
            progress.update(task, advance=len(evaluations) - again)

        yield update
        progress.update(task, total=progress.tasks[0].completed)


def _factors(evaluation: Evaluation) -> tuple:
    return evaluation.lambdas, evaluation.start_tokens, evaluation.attention_factor
