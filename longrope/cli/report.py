"""`longrope report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import one_sentence_errors


@one_sentence_errors
def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a run of search, extend, recover, evaluate, ...")
    ],
) -> None:
    """Write the report of a run, finished or not: report.html, results.csv and plots."""
    from longrope.report import write

    print(write(folder))
