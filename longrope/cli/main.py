"""The `longrope` command. Heavy imports happen inside the commands, so that `--help` is instant.

Bad input ends with one sentence on standard error and exit code 2, without a traceback.
"""

from __future__ import annotations

import typer

from longrope.cli.demo import demo
from longrope.cli.info import info
from longrope.cli.perplexity import perplexity
from longrope.cli.search import search

app = typer.Typer(
    help="Extend the context window of RoPE language models (LongRoPE, arXiv 2402.13753).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, search, perplexity, info):
    app.command()(command)


def main() -> None:
    """Entry point of the `longrope` command."""
    app()
