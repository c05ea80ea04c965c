"""`longrope demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import Seed, one_sentence_errors


@one_sentence_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table, plot and factors.")] = Path(
        "longrope-demo"
    ),
    seed: Seed = 0,
    iterations: Annotated[
        int | None, typer.Option(help="Generations of Algorithm 1; the default fits two CPU cores.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the gradient search; the default fits them too.")
    ] = None,
) -> None:
    """Extend the packaged tiny model's window 8x on this Python's own library sources."""
    from longrope.demo.run import run

    run(out, seed=seed, iterations=iterations, steps=steps)
