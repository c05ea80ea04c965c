"""What every command has: arguments of one meaning, and errors of one sentence."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.inputs import choose_device, rank

Model = Annotated[str, typer.Argument(help="Folder (or hub name) of a Hugging Face model.")]
Data = Annotated[Path, typer.Argument(help="Text file, folder of text, .jsonl or .parquet.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


def one_sentence_errors(command):
    """Turn the errors that bad input raises into one sentence and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, ImportError, NotImplementedError) as error:
            # What all ranks of a job end with is said by the first, and by the one that failed.
            if rank() in (0, getattr(error, "failed_rank", rank())):
                where = f" (rank {rank()})" if rank() else ""
                print(f"longrope{where}: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(2) from None
        except RuntimeError as error:
            if type(error).__name__ != "LostRankError":  # of a module that imports torch
                raise
            print(f"longrope: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            if rank() == 0:
                what = "interrupted"
                if type(error).__name__ == "TerminatedError":  # of a module that imports torch
                    what = "ended by torchrun, as when another rank has failed"
                resumes = "out" in kwargs and (Path(kwargs["out"]) / "journal.jsonl").exists()
                print(f"longrope: {what}" + "; the same command resumes" * resumes, file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped


def in_job(command):
    """Join the job, where torchrun started this process: a command with an option `device`."""

    @functools.wraps(command)
    def wrapped(*args, device, **kwargs):
        from longrope.distributed.torchrun import job

        with job(choose_device(device)) as device:
            return command(*args, device=device, **kwargs)

    return wrapped


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
