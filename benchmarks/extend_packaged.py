"""The packaged model, 256 -> 2,048 -> 8,192 bytes: the whole plan, beside what it is made of.

A search at 2,048, fine-tuning there under its tiers, a second search at 8,192 and recovery, then
the table by range of positions on files of Python's standard library that no stage saw. Beside it,
with the same budgets: training under one set for every position, as in the paper; direct
fine-tuning, on as many tokens of rows of the target length under a ladder that was searched for it;
and no training at all. Files of the role "train" are what the model was trained on; searches and
training take those of the role "search", the table those of the role "test".

    python benchmarks/extend_packaged.py --out FOLDER
    python benchmarks/extend_packaged.py --out FOLDER --cut  # of it: 256 -> 1,024 -> 2,048
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import longrope
from longrope.demo import corpus
from longrope.demo.run import load_packaged_model

SEARCH = {"kind": "search", "steps": 30, "samples": 3, "start_tokens": 0}
PLANS = ["position", "one", "direct", "none"]
TRAIN = {"batch_size": 4, "learning_rate": 2e-4, "warmup_steps": 5, "save_steps": 5}


RECOVER = {"kind": "recover", "lengths": [256, 512], "steps": 20, "samples": 3}


def progressive(middle: int, target: int, steps: int, tiers: str) -> list[dict]:
    """Return the plan; `tiers` is "position", or "one" for the paper's single set."""
    return [
        SEARCH | {"length": middle, "tiers": tiers},
        {"kind": "finetune", "length": middle, "tiers": tiers, "steps": steps, **TRAIN},
        SEARCH | {"length": target, "tiers": tiers},
        RECOVER,
    ]


def direct(middle: int, target: int, steps: int) -> list[dict]:
    """Return the plan that trains at the target alone, on as many tokens."""
    steps = max(1, steps * middle // target)
    return [
        SEARCH | {"length": target},
        {"kind": "finetune", "length": target, "steps": steps, **TRAIN | {"warmup_steps": 1}},
        RECOVER,
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="folder of the runs, which resume")
    p.add_argument("--cut", action="store_true", help="256 -> 1,024 -> 2,048 with fewer steps")
    p.add_argument("--only", nargs="+", choices=PLANS, default=PLANS, help="which plans")
    p.add_argument("--steps", type=int, help="of fine-tuning")
    p.add_argument("--threads", type=int, help="of torch; default: its own")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    middle, target = (1024, 2048) if args.cut else (2048, 8192)
    steps = args.steps or (20 if args.cut else 40)
    plans = {
        "position": progressive(middle, target, steps, "position"),
        "one": progressive(middle, target, steps, "one"),
        "direct": direct(middle, target, steps),
        "none": [SEARCH | {"length": target}],
    }
    documents = corpus.documents("search", min_length=middle)
    test = corpus.documents("test", min_length=target)
    for name in args.only:
        began = time.monotonic()
        result = longrope.extend(
            load_packaged_model(), documents, target_length=target, out=args.out / name,
            stages=plans[name], held_out=test, test_windows=8, progress=False,
        )  # fmt: skip
        print(f"\n{name}, {time.monotonic() - began:.0f} s (less where a run was resumed)\n")
        print(result.measured.table(), flush=True)


if __name__ == "__main__":
    main()
