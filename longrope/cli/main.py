"""The `longrope` command. Commands import torch and the like when they run: `--help` is instant.

Bad input ends with one sentence on standard error and exit code 2, without a traceback.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import longrope
from longrope.cli.demo import demo
from longrope.cli.evaluate import evaluate
from longrope.cli.export import export
from longrope.cli.extend import extend
from longrope.cli.info import info
from longrope.cli.passkey import passkey
from longrope.cli.perplexity import perplexity
from longrope.cli.recover import recover
from longrope.cli.report import report
from longrope.cli.search import search
from longrope.runs import times

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"longrope {longrope.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Extend the context window of RoPE language models (LongRoPE, arXiv 2402.13753)."""


for command in (
    demo, search, extend, recover, perplexity, passkey, evaluate, report, export, info,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Entry point of the `longrope` command."""
    times.came_from(sys.argv[1:])
    app()
