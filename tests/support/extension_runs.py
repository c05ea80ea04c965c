"""A tiny run of `longrope.extend` over all kinds of stages; and one that is killed many times.

`python -m support.extension_runs FOLDER` (with `tests` on the path) imports everything once, runs
the plan without interruption, then again in processes of which each is killed a little later.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from support.tiny_search import build_model

TARGET = 64
STAGES = [
    {"kind": "search", "length": 32, "steps": 2, "samples": 1},
    {
        "kind": "finetune", "length": 32, "steps": 3, "batch_size": 2, "rows_per_pass": 1,
        "save_steps": 1, "warmup_steps": 1, "learning_rate": 1e-3,
    },
    {"kind": "search", "length": 64, "steps": 2, "samples": 1},
    {"kind": "recover", "lengths": [16], "steps": 2, "samples": 1},
]  # fmt: skip
#: What a run leaves that must be the same, to the bit.
RESULTS = ("model/model.safetensors", "model/longrope.json", "tiers.json", "table.md")
#: Events (a write that is made durable, a pass of training) before a process is killed: more each
#: time, so that every process gets further than the one before.
FIRST, MORE = 9, 4


def documents(count=12, length=150):
    """Return random documents of a vocabulary of 40."""
    generator = torch.Generator().manual_seed(5)
    return list(torch.randint(40, (count, length), generator=generator))


def run(out, model=build_model, **changes):
    """Run the plan on the tiny model, or on what `model()` returns."""
    import longrope

    arguments = {"target_length": TARGET, "stages": STAGES, "progress": False, "test_windows": 2}
    return longrope.extend(model(), documents(), out=out, **arguments | changes)


def _die_after(events: int) -> None:
    """Send SIGKILL to this process at an event of that number."""
    from longrope.extension.trainer import RowTrainer

    count = []

    def counted(function):
        def called(*args, **kwargs):
            count.append(1)
            if len(count) == events:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    os.fsync = counted(os.fsync)
    RowTrainer.training_step = counted(RowTrainer.training_step)


def killed(out: Path) -> int:
    """Run the plan in processes that are killed; returns how many were before one came through."""
    for life in range(60):
        child = os.fork()
        if child == 0:
            _die_after(FIRST + MORE * life)
            run(out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return life
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise RuntimeError("no process came through")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Once, for all processes.
    import matplotlib.pyplot  # noqa: F401

    import longrope.extension.trainer  # noqa: F401
    from longrope.report import writing

    writing.write = lambda folder: None  # the plots of every process take longer than its run

    child = os.fork()
    if child == 0:
        run(folder / "whole")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    (folder / "lives").write_text(str(killed(folder / "killed")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
