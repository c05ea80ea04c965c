"""The second interpolation on a fine-tuned model: PI, YaRN and a search; start tokens ablated.

The packaged model as `training_comparison.py` has trained it at 1,024 bytes, from there to 4,096
without another step of training (LongRoPE, section 3.3). Factors are those of training times a
stage of 4x by each rule, or what `longrope.search` finds; by position above the tiers of training,
or one set for every position, as the model was trained. Perplexity by range of positions on files
that no stage saw.

    python benchmarks/training_comparison.py --out FOLDER --seeds 0
    python benchmarks/second_interpolation.py --out FOLDER --save  # goes on where it was killed
    python benchmarks/second_interpolation.py --table
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, append, by_ranges, ranged, saved, where
from training_comparison import LENGTH, SEARCH, factors, trained

import longrope
from longrope.demo import corpus
from longrope.documents import as_documents
from longrope.extension.table import excerpts, measure
from longrope.factors.tiers import ranges_of

FILE = RESULTS / "second_interpolation.csv"
START_TOKENS = (0, 4, 16, 64, 256)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, help="the folder of training_comparison.py")
    p.add_argument("--ways", nargs="+", default=["position", "one"], choices=["position", "one"])
    p.add_argument("--target", type=int, default=4 * LENGTH)
    p.add_argument("--steps", type=int, default=20, help="of the training")
    p.add_argument("--rate", type=float, default=2e-4, help="its learning rate")
    p.add_argument("--seed", type=int, default=0, help="its seed")
    p.add_argument("--batch-size", type=int, default=4, help="its rows of a step")
    p.add_argument("--test-windows", type=int, default=4)
    p.add_argument("--save", action="store_true", help="append rows to benchmarks/results/")
    p.add_argument("--table", action="store_true", help="only print the table of what was saved")
    return p.parse_args()


def second_stages(
    model: torch.nn.Module, below: longrope.Tiers, args: argparse.Namespace, way: str
) -> Iterator[tuple[str, longrope.RescaleFactors]]:
    """Yield the factors of each way to reach the target, the product of both stages."""
    first = below[-1]
    on_top = {
        "original_length": LENGTH, "target_length": args.target, "rope_theta": first.rope_theta,
        "rotary_dim": first.rotary_dim,
    }  # fmt: skip
    for rule in ("pi", "ntk", "yarn"):
        yield rule, first * getattr(longrope.RescaleFactors, rule)(**on_top)
    longrope.apply(model, below)
    try:
        found = longrope.search(
            model, corpus.documents("search", min_length=args.target), ladder=way == "position",
            out=args.out / f"second-{way}-{args.target}",
            **SEARCH | {"target_length": args.target},
        )  # fmt: skip
    finally:
        longrope.remove(model)
    for count in START_TOKENS:
        label = "searched" if count == 0 else f"searched, {count} start tokens"
        *below, last = found.tiers or [found.factors]
        yield label, longrope.Tiers([*below, last.replace(start_tokens=count)])


def rows(args: argparse.Namespace, done: set[tuple[str, str, str]]) -> Iterator[dict]:
    """Yield the row of everything that `done` does not hold."""
    documents = as_documents(corpus.documents("search", min_length=LENGTH))
    ladder, one = factors(args.out, documents)
    test = corpus.documents("test", min_length=args.target)
    test = excerpts(as_documents(test), args.target, args.test_windows, 0)
    ranges = ranges_of(256, args.target)
    how: dict[str, Any] = {"steps": args.steps, "learning_rate": args.rate, "seed": args.seed}
    for way in args.ways:
        _, model, *_ = next(trained(way, args, ladder, one, documents, **how))
        below = ladder if way == "position" else longrope.Tiers([one])
        for name, found in second_stages(model, below, args, way):
            if (way, name, str(args.target)) in done:
                continue
            if isinstance(found, longrope.RescaleFactors):
                found = longrope.Tiers([*below, found] if way == "position" else [found])
            longrope.apply(model, found)
            row = measure(name, model, test, ranges)
            longrope.remove(model)
            yield {
                "way": way, "second": name, "target": args.target, **how,
                "perplexity": f"{row.overall:.4f}",
                "by_range": ranged(ranges, row.by_range),
                "test_windows": args.test_windows, **where(),
            }  # fmt: skip


def print_table(rows: list[dict]) -> None:
    """Print the rows of each way of training and target."""
    head: list[str] = []
    for row in rows:
        values = by_ranges(row)
        if list(values) != head:
            head = list(values)
            print(f"\n| trained by | second stage | {' | '.join(head)} | all |")
            print("| --- " * (3 + len(head)) + "|")
        cells = [f"{value:.3f}" for value in values.values()]
        print(
            f"| {row['way']} | {row['second']} | {' | '.join(cells)} | "
            f"{float(row['perplexity']):.3f} |"
        )


def main() -> None:
    """Measure what is missing and report."""
    args = arguments()
    if args.table:
        return print_table(saved(FILE))
    if args.out is None:
        raise SystemExit("--out: expected a folder")
    made = []
    for row in rows(args, {(row["way"], row["second"], row["target"]) for row in saved(FILE)}):
        print("  ".join(str(value) for value in list(row.values())[:8]), flush=True)
        if args.save:
            append([row], FILE, list(row))
        made.append(row)
    print_table(made)
    return None


if __name__ == "__main__":
    main()
