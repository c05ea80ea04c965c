"""What the commands share: arguments with one meaning, and errors in one sentence."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from longrope.cli.inputs import choose_device, rank
from longrope.errors import LostRankError, TerminatedError
from longrope.runs.folder import JOURNAL

#: A heading in the help of commands.
READING = "How DATA is read"

Model = Annotated[str, typer.Argument(help="Folder (or hub name) of a Hugging Face model.")]
Data = Annotated[
    list[Path],
    typer.Argument(help="Files or folders: text, .jsonl, .json, .parquet, .arrow, token ids."),
]
TextField = Annotated[
    str, typer.Option(help="The field or column that holds the text.", rich_help_panel=READING)
]
TokenDtype = Annotated[
    str | None,
    typer.Option(
        help="The type of the token ids in .bin files, such as uint16.", rich_help_panel=READING
    ),
]
TokenCache = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps the token ids of text files for the next call.",
        rich_help_panel=READING,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
DEVICE = "cpu or cuda; default: cuda where there is a GPU."
Dtype = Annotated[
    str,
    typer.Option(
        help="What MODEL is computed in: auto (its own, or float32 on a CPU that is faster in it), "
        "float32, bfloat16 or float16."
    ),
]

#: The arguments of commands by their names in the library; all others are options.
_ARGUMENTS = {
    "model": "MODEL",
    "documents": "DATA",
    "data": "DATA",
    "what": "WHAT",
    "folder": "DIR",
}


def one_sentence_errors(command):
    """Turn the errors that bad input raises into one sentence and exit code 2.

    Where the library names an argument of its own, the sentence names the command's.
    """
    names = {name: f"--{name.replace('_', '-')}" for name in inspect.signature(command).parameters}
    names |= _ARGUMENTS

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            with _one_sentence_warnings():
                return command(*args, **kwargs)
        except (ValueError, OSError, ImportError, NotImplementedError) as error:
            # The error that ends all ranks is printed by the first, and by the one that failed.
            if rank() in (0, getattr(error, "failed_rank", rank())):
                where = f" (rank {rank()})" if rank() else ""
                print(f"longrope{where}: {_one_line(error, names)}", file=sys.stderr)
            raise typer.Exit(2) from None
        except LostRankError as error:
            print(f"longrope: {_one_line(error, names)}", file=sys.stderr)
            raise typer.Exit(1) from None
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            asked = re.search(r"[Tt]ried to allocate [\d.]+ \w+|Unable to allocate .*", str(error))
            asked = f" ({asked[0][0].lower()}{asked[0][1:]})" if asked else ""
            _print_end(f"out of memory{asked}, which other processes may hold", kwargs)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            if rank() == 0:
                by_job = isinstance(error, TerminatedError)
                ended = "ended by torchrun, as when another rank has failed"
                _print_end(ended if by_job else "interrupted", kwargs)
            raise typer.Exit(130) from None

    return wrapped


def ran_out_of_memory(error: BaseException) -> bool:
    """Say whether there was no memory left, on a GPU or in the host, for torch or for numpy."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def _print_end(what: str, arguments: Mapping[str, Any]) -> None:
    """Say what ended a command, and whether it can go on."""
    out = arguments.get("out")
    resumes = out is not None and (Path(out) / JOURNAL).exists()
    where = f" (rank {rank()})" if rank() else ""
    print(f"longrope{where}: {what}" + "; the same command resumes" * resumes, file=sys.stderr)


@contextlib.contextmanager
def _one_sentence_warnings() -> Iterator[None]:
    """Show our warnings as one sentence: the lines that they name are not the user's here."""
    own = warnings.showwarning

    def show(message, category, *where, **options):
        if category is not UserWarning:
            own(message, category, *where, **options)
        elif rank() == 0:
            print(f"longrope: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def in_job(command):
    """Let a command with an option `device` join the job, if torchrun started this process."""

    @functools.wraps(command)
    def wrapped(*args, device, **kwargs):
        from longrope.distributed.torchrun import job

        with job(choose_device(device)) as device:
            return command(*args, device=device, **kwargs)

    return wrapped


def _one_line(error: Exception, names: Mapping[str, str]) -> str:
    """Return an error as one line; `names` are the command's of the library's arguments."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:  # without "[Errno 28]"
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    line = " ".join(text.split()) or type(error).__name__
    return re.sub(
        r"^((?:rank \d+: )?)(\w+)(?=(?:\[\d+\])?: )",
        lambda found: found[1] + names.get(found[2], found[2]),
        line,
    )
