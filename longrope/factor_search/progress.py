"""The progress bar of a search: what it counts, and which value it shows."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence

from longrope.factor_search.history import Evaluation, Role
from longrope.runs.progress import bar


@contextlib.contextmanager
def progress_bar(
    show: bool | Callable[[Sequence[Evaluation]], None],
    total: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[Sequence[Evaluation], int], None]]:
    """Count evaluations and show the best perplexity on the search windows.

    Yields the function to call with new evaluations and the tokens that were measured for them: 0
    where they came from a journal. A function in place of `show` is called with the evaluations
    instead, and nothing is shown.

    `total` is the most evaluations that the search can make: candidates that repeat cost nothing,
    so it may end earlier. A candidate in a race counts once, when it is first measured.
    """
    if callable(show):
        yield lambda evaluations, tokens: show(evaluations)
        return
    if not show:
        yield lambda evaluations, tokens: None
        return
    best, raced, tier = math.inf, set(), None
    with bar(total, "perplexity", clock) as update:

        def count(evaluations: Sequence[Evaluation], tokens: int) -> None:
            nonlocal best, tier
            value = None
            if evaluations[0].tier != tier:  # another range of positions
                best, tier = math.inf, evaluations[0].tier
                raced.clear()
            if evaluations[0].role == Role.SEARCH:
                best = min(best, *(e.perplexity for e in evaluations))
                value = f"{best:.4f}"
            again = sum(
                e.role in (Role.RACE, Role.SEARCH) and e.factors in raced for e in evaluations
            )
            raced.update(e.factors for e in evaluations if e.role == Role.RACE)
            update(len(evaluations) - again, tokens, value)

        yield count
