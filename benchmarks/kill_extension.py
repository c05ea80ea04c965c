"""A run of `longrope.extend` over all kinds of stages, killed again and again: the same bits?

The packaged model, 256 -> 384 -> 512 bytes: search, fine-tuning, second search, recovery, export.
First without interruption, then in processes of which each gets SIGKILL at a random moment, spread
evenly over what the run writes, until one comes through. In the end all files are compared, but for
those that hold the time of day.

    python benchmarks/kill_extension.py --out FOLDER
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch

import longrope
import longrope.extension.trainer  # once, for all processes
from longrope.demo import corpus
from longrope.demo.run import load_packaged_model

MIDDLE, TARGET = 384, 512
#: Steps of fine-tuning, each of which counts as much as so many lines of a journal.
STEPS, WEIGHT = 6, 6
SEARCH = {"kind": "search", "steps": 3, "samples": 1, "start_tokens": 0}
STAGES = [
    SEARCH | {"length": MIDDLE},
    {"kind": "finetune", "length": MIDDLE, "steps": STEPS, "batch_size": 2, "save_steps": 1},
    SEARCH | {"length": TARGET},
    {"kind": "recover", "lengths": [256], "steps": 3, "samples": 1},
]
#: The files that hold times; all others must be the same, to the bit.
TIMES = ("times.jsonl", "report.html")
#: A killer looks this often, and lets so much time pass at most, in seconds.
LOOK, DELAY = 0.002, 0.3


def run(out: Path) -> None:
    """Run the plan, or what is left of it."""
    documents = corpus.documents("search", min_length=TARGET)[:6]
    longrope.extend(
        load_packaged_model(), documents, target_length=TARGET, out=out, stages=STAGES,
        test_windows=1, progress=False,
    )  # fmt: skip


def child_of(out: Path) -> int:
    """Start the run in a process of its own."""
    child = os.fork()
    if child == 0:
        run(out)
        os._exit(0)
    return child


def progress(out: Path) -> int:
    """Count what a run has kept: lines of journals, and steps of checkpoints."""
    lines = sum(path.read_bytes().count(b"\n") for path in out.rglob("journal.jsonl"))
    stages = out / "stages"
    saved = [int(path.name[11:]) for path in stages.glob("*/checkpoint-*")]
    trained = STEPS * len(list(stages.glob("*/weights")))
    return lines + WEIGHT * max([trained, *saved])


def where(out: Path) -> str:
    """Return the stage that a run was in."""
    begun = sorted(path.name for path in (out / "stages").glob("*"))
    return begun[-1] if begun else "before the first stage"


def killed(out: Path, kills: int, total: int, moments: random.Random) -> int:
    """Run in processes that are killed; returns how many of them were."""
    for number in range(kills):
        goal = total * (number + moments.random()) / (kills + 1)
        child = child_of(out)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert os.waitstatus_to_exitcode(status) == 0
                return number
            if progress(out) >= goal:
                break
            time.sleep(LOOK)
        time.sleep(moments.uniform(0, DELAY))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            return number
        print(f"kill {number + 1:2}: {where(out)}, {progress(out)} of {total}", flush=True)
    assert os.waitpid(child_of(out), 0)[1] == 0
    return kills


def compare(whole: Path, cut: Path) -> None:
    """Print whether two runs left the same files, to the bit."""
    files, others = ({f.relative_to(o) for f in o.rglob("*") if f.is_file()} for o in (whole, cut))
    print(f"{len(files)} files: {'the same' if files == others else 'OTHERS'}")
    files &= others
    files -= {file for file in files if file.name in TIMES}
    changed = [f for f in sorted(files) if (whole / f).read_bytes() != (cut / f).read_bytes()]
    print(f"{len(files)} without times: {'the same bits' if not changed else 'DIFFERENT'}")
    for file in changed:
        print(f"  {file}")


def main() -> None:
    """Run both and compare."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="folder of both runs, written anew")
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args()
    torch.set_num_threads(1)
    whole, cut = args.out / "whole", args.out / "killed"
    for folder in (whole, cut):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    began = time.monotonic()
    assert os.waitpid(child_of(whole), 0)[1] == 0
    print(f"uninterrupted: {time.monotonic() - began:.0f} s", flush=True)
    began = time.monotonic()
    count = killed(cut, args.kills, progress(whole), random.Random(args.seed))
    print(f"killed {count} times: {time.monotonic() - began:.0f} s")
    compare(whole, cut)


if __name__ == "__main__":
    main()
