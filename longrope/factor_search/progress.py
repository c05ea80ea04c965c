"""The progress bar of a search."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

from longrope.factor_search.ledger import Evaluation


@contextlib.contextmanager
def progress_bar(show: bool, total: int) -> Iterator[Callable[[Sequence[Evaluation]], None]]:
    """Show evaluations done, the best perplexity and the time left; yields the update function.

    `total` is the most evaluations that the search can make: candidates that repeat cost nothing,
    so it may end earlier.
    """
    if not show:
        yield lambda evaluations: None
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

    best = math.inf
    with Progress(
        TextColumn("search"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("best perplexity {task.fields[best]}"),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        speed_estimate_period=120,
        console=Console(stderr=True),  # results go to standard output
    ) as progress:
        task = progress.add_task("search", total=total, best="-")

        def update(evaluations: Sequence[Evaluation]) -> None:
            nonlocal best
            if evaluations[0].role == "search":
                best = min(best, *(e.perplexity for e in evaluations))
                progress.update(task, best=f"{best:.4f}")
            progress.update(task, advance=len(evaluations))

        yield update
        progress.update(task, total=progress.tasks[0].completed)
