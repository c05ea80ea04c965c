"""The packaged model, 256 -> 2,048 -> 8,192 bytes: the whole plan, beside what it is made of.

A search at 2,048, fine-tuning there under its tiers, a second search at 8,192 and recovery, then
the table by range of positions on files of Python's standard library that no stage saw. Beside it,
with the same budgets: no training at all (one ladder searched for 8,192), and training under one
set for every position, as in the paper. Files of the role "train" are what the model was trained
on; searches and training take those of the role "search", the table those of the role "test".

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

#: Of the whole, and of the cut.
SEARCH = {"steps": 30, "samples": 3, "start_tokens": 0}
SHORT_SEARCH = {"steps": 15, "samples": 2, "start_tokens": 0}
TRAIN = {"batch_size": 4, "learning_rate": 2e-4, "warmup_steps": 5, "save_steps": 20}


def stages(middle: int, target: int, steps: int, tiers: str, search: dict) -> list[dict]:
    """Return the plan; `tiers` is "position", or "one" for the paper's single set."""
    of = {"kind": "search", "tiers": tiers, **search}
    return [
        {**of, "length": middle},
        {"kind": "finetune", "length": middle, "tiers": tiers, "steps": steps, **TRAIN},
        {**of, "length": target},
        {"kind": "recover", "lengths": [256, 512], "steps": 20, "samples": 3},
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="folder of the runs, which resume")
    p.add_argument("--cut", action="store_true", help="256 -> 1,024 -> 2,048 with fewer steps")
    p.add_argument("--only", nargs="+", default=["position", "one", "none"], help="which plans")
    p.add_argument("--steps", type=int, help="of fine-tuning")
    p.add_argument("--threads", type=int, help="of torch; default: its own")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    middle, target = (1024, 2048) if args.cut else (2048, 8192)
    steps = args.steps or (20 if args.cut else 40)
    search = SHORT_SEARCH if args.cut else SEARCH
    plans = {
        "position": stages(middle, target, steps, "position", search),
        "one": stages(middle, target, steps, "one", search),
        "none": [{"kind": "search", "length": target, **search}],
    }
    documents = corpus.documents("search", min_length=middle)
    test = corpus.documents("test", min_length=target)
    for name in args.only:
        began = time.monotonic()
        result = longrope.extend(
            load_packaged_model(), documents, target_length=target, out=args.out / name,
            stages=plans[name], held_out=test, test_windows=4 if args.cut else 8, progress=False,
        )  # fmt: skip
        print(f"\n{name}, {time.monotonic() - began:.0f} s (less where a run was resumed)\n")
        print(result.measured.table(), flush=True)


if __name__ == "__main__":
    main()
