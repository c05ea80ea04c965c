"""The folder of a run of `longrope.extend`: what is kept, and when a stage counts as done.

The journal has a line for every finished stage, written when all that the stage leaves is on the
disk. Before that line the stage runs again, and goes on by what it kept itself: a search by its own
journal, fine-tuning by its last complete checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longrope._files import new_folder
from longrope.distributed.ranks import Ranks
from longrope.errors import JournalError
from longrope.evaluation.identity import digests, fingerprint
from longrope.extension.plan import Plan
from longrope.extension.table import row_from_json
from longrope.factors import Tiers
from longrope.patching.saving import exporting
from longrope.patching.wrappers import language_model
from longrope.report.extension import BASELINES, EXPORT, KIND, STAGES, TIERS
from longrope.runs import folder
from longrope.runs.journal import Journal, Replay, is_begun, read

MODEL, TABLE = "model", "table.md"
#: The weights that a stage of fine-tuning leaves in its own folder.
WEIGHTS = "weights"


def prepare(out: str | Path, resume: bool) -> Path:
    """Create or check the folder, see `longrope.runs.folder.prepare`."""
    return folder.prepare(out, KIND, (STAGES, MODEL, TIERS, TABLE, BASELINES), resume)


def header(
    plan: Plan,
    model: nn.Module,
    documents: Iterable[torch.Tensor],
    held_out: Iterable[torch.Tensor],
) -> dict[str, Any]:
    """Return what a run must share to be resumed."""

    return {
        "plan": plan.as_dict(),
        "model": fingerprint(model),
        "documents": digests(documents),
        "held_out": digests(held_out),
    }


def explain(difference: str) -> str:
    """Return a difference between two headers in the words of `longrope.extend`."""
    return difference.removeprefix("plan.")


def clear(out: Path) -> None:
    """Remove what a killed process was writing, which has a hidden name until it is whole.

    Beside the folder of the stages only what is named after a file of a run: `out` may be a folder
    that holds other things.
    """
    ours = (folder.CONFIG, TIERS, TABLE, MODEL, BASELINES, folder.REPORT, folder.ROWS)
    beside = [path for name in ours for path in out.glob(f".{name}.????????")]
    beside += (out / folder.PLOTS).glob(".*.????????")
    for half in [*beside, *(out / STAGES).rglob(".*.*")]:
        if half.is_dir():
            shutil.rmtree(half)
        else:
            half.unlink(missing_ok=True)  # it may have been in a folder before it


@contextlib.contextmanager
def opened(
    out: Path, head: Mapping[str, Any], resume: bool, job: Ranks, notes: Mapping[str, Any]
) -> Iterator[Replay]:
    """Hold the folder and its journal, which the first rank writes; others have what it held.

    What a killed run was writing is removed. `JournalError` where the journal is that of another
    plan, model or documents.
    """
    with contextlib.ExitStack() as stack:
        journal = None
        if job.first:
            prepare(out, resume)
            journal = stack.enter_context(
                Journal(out / folder.JOURNAL, dict(head), dict(notes), kind=KIND, explain=explain)
            )
            clear(out)
            folder.write_config(out, {"options": head["plan"], **head})
        pending = job.broadcast(None if journal is None else journal.pending)
        job.when_lost = "the same command resumes"
        yield Replay(out / folder.JOURNAL, {}, pending) if journal is None else journal


def weights_hash(model: nn.Module) -> str:
    """Return a hash of every bit of the parameters and persistent buffers."""
    found = hashlib.sha256()
    for name, tensor in language_model(model).state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy())
    return found.hexdigest()


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Let transformers show no progress bars of its own inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights as transformers does, in safetensors; whole or not at all."""
    from safetensors import SafetensorError

    try:
        with new_folder(path) as temporary, exporting():  # the run has the factors
            language_model(model).save_pretrained(temporary)
    except (OSError, SafetensorError) as error:  # the second's I/O errors are no OSError
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"out: cannot write {path} ({reason})") from None


def _unreadable(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"out: cannot read {path} ({reason}); choose another folder, or resume=False "
        "(--no-resume) to start again"
    )


def load_tiers(path: Path) -> Tiers:
    """Return the tiers that a stage ended with.

    Raises `ValueError` in one sentence where they are gone or damaged.
    """
    try:
        return Tiers.load(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, "there is no such file" if not path.is_file() else error) from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Give a model the weights that `save_weights` wrote, in place.

    Raises `ValueError` in one sentence where they are gone or damaged.
    """
    from safetensors import SafetensorError

    inner = language_model(model)
    try:
        # In float32, which holds every 16-bit number: a model may have weights of several types.
        stored = type(inner).from_pretrained(path, dtype=torch.float32, local_files_only=True)
    except (OSError, SafetensorError) as error:
        reason = "there is no such folder" if not path.is_dir() else str(error).split("\n")[0]
        raise _unreadable(path, reason) from None
    inner.load_state_dict(stored.state_dict())


def is_one(out: Path) -> bool:
    """Say whether a folder is that of a run of `longrope.extend` that has begun."""
    try:
        return is_begun(out / folder.JOURNAL, KIND)
    except JournalError:
        return False


def summary(out: Path) -> dict[str, Any]:
    """Return what a folder holds, in words: the plan, and how far the run is."""
    header, entries = read(out / folder.JOURNAL)
    plan, rows = header["plan"], {e["stage"]: e.get("row") for e in entries}
    facts: dict[str, Any] = {
        "extension": f"{plan['window']} to {plan['target_length']} tokens",
        "seed": plan["seed"],
    }
    for name, stage in plan["stages"].items():
        row = rows.get(name)
        reached = "to be done"
        if row:
            reached = f"perplexity {row_from_json(row).overall:.4f} on the held-out text"
        facts[f"{stage['number']} {name}"] = reached
    finished = EXPORT in rows
    facts["state"] = "finished" if finished else "not finished; the same command resumes"
    return facts
