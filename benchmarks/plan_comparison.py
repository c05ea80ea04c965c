"""Plans of an extension side by side: by position, by head, one set, direct training, no training.

The plan is that of the paper: for each length but the last a search and fine-tuning under what it
found, at the last a second search, then recovery. Beside it, with the same budgets: the same with
factors of their own for all heads at the last, not recovered; training under one set for every
position, as in the paper; direct fine-tuning, on as many tokens of rows of the target length under
a ladder that was searched for it; and no training at all. Every row is a stage: perplexity by range
of positions on text that no stage saw.

The packaged model of 256 bytes searches and trains on Python's standard library, the files of the
role "search"; the model of book_model.py on all books but those of the role "test".

    python benchmarks/plan_comparison.py --out FOLDER --save  # 2,048 and 8,192; goes on if killed
    python benchmarks/plan_comparison.py --out FOLDER --lengths 1024 2048 --steps 20 --save
    python benchmarks/plan_comparison.py --out FOLDER --only position --search-steps 15 --save
    python benchmarks/plan_comparison.py --out FOLDER --model MODEL --books FOLDER --save \
        --lengths 2048 16384 131072 --device cuda --dtype bfloat16
    python benchmarks/plan_comparison.py --table
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import book_model
import torch
from harness import RESULTS, WHERE, append, by_ranges, ranged, saved, where

import longrope
from longrope.cli.inputs import load_model
from longrope.demo import corpus
from longrope.demo.run import load_packaged_model

SEARCH = {"kind": "search", "samples": 3, "start_tokens": 0}
TRAIN = {"batch_size": 4, "learning_rate": 2e-4, "warmup_steps": 5, "save_steps": 5}
RECOVER = {"kind": "recover", "lengths": [256, 512], "steps": 20, "samples": 3}
PLANS = ["position", "head", "one", "direct", "none"]
FILE = RESULTS / "plan_comparison.csv"
#: What a comparison of plans has in common.
ABOUT = ("model", "lengths", "steps", "search_steps", "seed", "dtype", "device")
FIELDS = (
    "model",
    "lengths",
    "plan",
    "stage",
    "perplexity",
    "by_range",
    "steps",
    "search_steps",
    "seed",
    "test_windows",
    "dtype",
    "seconds",
    *WHERE,
)


def progressive(args: argparse.Namespace, tiers: str, per: str = "model") -> list[dict]:
    """Return the plan; `tiers`: "position", or "one" for the paper's single set; `per`: at last."""
    search, stages = SEARCH | {"steps": args.search_steps, "tiers": tiers}, []
    for length in args.lengths[:-1]:
        stages.append(search | {"length": length})
        stages.append(
            {"kind": "finetune", "length": length, "tiers": tiers, "steps": args.steps, **TRAIN}
        )
    last = search | {"length": args.lengths[-1], "per": per}
    return [*stages, last, *([RECOVER] if per == "model" else [])]


def direct(args: argparse.Namespace) -> list[dict]:
    """Return the plan that trains at the target alone, on as many tokens."""
    *before, target = args.lengths
    few = max(1, args.steps * sum(before) // target)
    return [
        *untrained(args),
        {"kind": "finetune", "length": target, "steps": few, **TRAIN | {"warmup_steps": 1}},
        RECOVER,
    ]


def untrained(args: argparse.Namespace) -> list[dict]:
    """Return the plan that searches at the target alone."""
    return [SEARCH | {"steps": args.search_steps, "length": args.lengths[-1]}]


def load(args: argparse.Namespace) -> torch.nn.Module:
    """Return the model."""
    if args.model is None:
        return load_packaged_model().to(args.device, getattr(torch, args.dtype))
    return load_model(args.model, args.device, args.dtype)[0]


def texts(args: argparse.Namespace) -> tuple[list, list]:
    """Return documents for the stages, and those of the table."""
    *before, target = args.lengths
    if args.model is None:
        documents = corpus.documents("search", min_length=max(before, default=target))
        return documents, corpus.documents("test", target)
    books = {role: book_model.documents(args.books, role) for role in ("train", "search", "test")}
    test = [
        book[begin : begin + target]
        for book in books["test"]
        for begin in range(0, len(book) - target + 1, target)
    ]
    return books["train"] + books["search"], test


def rows(args: argparse.Namespace, known: set[tuple[str, ...]]) -> Iterator[dict]:
    """Run the plans that are not known, and yield the rows of their tables."""
    about = {
        "model": "packaged" if args.model is None else args.model.name,
        "lengths": " ".join(map(str, args.lengths)), "steps": str(args.steps),
        "search_steps": str(args.search_steps), "seed": str(args.seed), "dtype": args.dtype,
        "device": where(args.device)["device"],
    }  # fmt: skip
    plans = {
        "position": progressive(args, "position"),
        "head": progressive(args, "position", "head"),
        "one": progressive(args, "one"),
        "direct": direct(args),
        "none": untrained(args),
    }
    documents, test = texts(args)
    for name in args.only:
        if (*about.values(), name) in known:
            continue
        model = load(args)  # anew: without training a plan leaves its tiers in the model
        began = time.monotonic()
        result = longrope.extend(
            model, documents, target_length=args.lengths[-1], out=args.out / name,
            stages=plans[name], held_out=test, test_windows=args.test_windows, seed=args.seed,
            progress=False,
        )  # fmt: skip
        seconds = time.monotonic() - began
        print(f"\n{name}, {seconds:.0f} s (less where a run was resumed)\n")
        print(result.measured.table(), flush=True)
        for row in result.measured.rows:
            yield about | {
                "plan": name, "stage": row.name, "perplexity": f"{row.overall:.4f}",
                "by_range": ranged(result.measured.ranges, row.by_range),
                "test_windows": result.measured.documents, "seconds": f"{seconds:.0f}",
                **where(args.device),
            }  # fmt: skip


def tables(rows: list[dict]) -> list[str]:
    """Return a table for each model and its lengths: the first plan whole, the ends of others."""
    groups: dict[tuple[str, ...], dict[str, list[dict]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ABOUT)
        groups.setdefault(key, {}).setdefault(row["plan"], []).append(row)
    lines = []
    for (model, lengths, steps, search_steps, seed, dtype, device), plans in groups.items():
        names = list(by_ranges(next(iter(plans.values()))[0]))
        lines += [
            f"{model}, 256 -> {lengths.replace(' ', ' -> ')}; {steps} steps of each fine-tuning, "
            f"{search_steps} of each search; seed {seed}; {dtype}, {device}", "",
            f"| plan | stage | {' | '.join(names)} | all |",
            "| --- | --- |" + " ---: |" * (1 + len(names)),
        ]  # fmt: skip
        for plan in sorted(plans, key=PLANS.index):
            stages = plans[plan] if plan == PLANS[0] else plans[plan][-1:]
            for row in stages:
                values = *by_ranges(row).values(), float(row["perplexity"])
                cells = [f"{value:.3f}" for value in values]
                stage = row["stage"].partition(": ")
                lines.append(f"| {plan} | {stage[2] or stage[0]} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def main() -> None:
    """Run the plans and report."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, help="folder of the runs, which resume")
    p.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], help="they grow")
    p.add_argument("--only", nargs="+", choices=PLANS, default=PLANS, help="which plans")
    p.add_argument("--steps", type=int, default=40, help="of each fine-tuning")
    p.add_argument("--search-steps", type=int, default=30, help="of each search")
    p.add_argument("--model", type=Path, help="of book_model.py; default: the packaged one")
    p.add_argument("--books", type=Path, help="the folder of text that --model was trained on")
    p.add_argument("--test-windows", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--threads", type=int, help="of torch; default: its own")
    p.add_argument("--csv", type=Path, help="append rows to this file")
    p.add_argument("--save", action="store_true", help="append rows to benchmarks/results/")
    p.add_argument("--table", action="store_true", help="only print the tables of what was saved")
    args = p.parse_args()
    if args.table:
        print("\n".join(tables(saved(FILE))))
        return
    if args.out is None or (args.model is None) != (args.books is None):
        raise SystemExit("expected --out FOLDER, and --model with --books or none of both")
    if args.threads:
        torch.set_num_threads(args.threads)
    file = FILE if args.save else args.csv
    known = (
        {(*(row[name] for name in ABOUT), row["plan"]) for row in saved(file)} if file else set()
    )
    for row in rows(args, known):
        if file:
            append([row], file, FIELDS)


if __name__ == "__main__":
    main()
