"""Ways to train under factors, on the packaged model: by range of positions, over seeds.

One ladder and one set are searched for 1,024 bytes (four windows), once. Then every way of training
gets the same rows of text, steps and learning rate, and is measured on files that no stage saw:

- position: each token under the tier of its position;
- mixed: the same, and a third of the rows hold windows of the original length;
- one: every position under the one set (LongRoPE), as it is and recovered at 256 and 512 as tiers;
- row: mixed windows (LongRoPE2), short rows under the original RoPE, long rows under the one set;
- plain: no factors at all, direct fine-tuning.

    python benchmarks/training_comparison.py --out FOLDER --save  # goes on where it was killed
    python benchmarks/training_comparison.py --table
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, append, saved, where

import longrope
from longrope.demo import corpus
from longrope.demo.run import load_packaged_model
from longrope.documents import as_documents
from longrope.extension.finetune import finetune
from longrope.extension.plan import FinetuneStage
from longrope.extension.table import excerpts

FILE = RESULTS / "training_comparison.csv"
WINDOW, LENGTH = 256, 1024
RANGES = [(0, 256), (256, 512), (512, 1024)]
SHORT_ROWS = 0.34
WAYS = ("position", "mixed", "one", "row", "plain")
SEARCH = {"target_length": LENGTH, "steps": 30, "samples": 3, "start_tokens": 0, "progress": False}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, help="folder of what is searched and trained")
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, nargs="+", default=[20])
    p.add_argument("--rates", type=float, nargs="+", default=[2e-4], help="learning rates")
    p.add_argument("--batch-size", type=int, default=4, help="rows of a step")
    p.add_argument("--test-windows", type=int, default=12)
    p.add_argument("--save", action="store_true", help="append rows to benchmarks/results/")
    p.add_argument("--table", action="store_true", help="only print the table of what was saved")
    return p.parse_args()


def factors(out: Path, documents: Any) -> tuple[longrope.Tiers, longrope.RescaleFactors]:
    """Return the ladder and the one set, searched with the same budget."""
    model = load_packaged_model()
    ladder = longrope.search(model, documents, out=out / "ladder", ladder=True, **SEARCH).tiers
    return ladder, longrope.search(model, documents, out=out / "one", **SEARCH).factors


class Measure:
    """Perplexities of windows of both lengths on test documents."""

    def __init__(self, windows: int):
        self.texts = excerpts(corpus.documents("test", min_length=LENGTH), LENGTH, windows, 0)

    def __call__(self, model: torch.nn.Module, given: Any, short: Any) -> dict[str, str]:
        """Measure under `given`, and windows of the original length under `short`; None: loaded."""
        by_range = self._perplexity(model, given, LENGTH, RANGES)
        alone = self._perplexity(model, short, WINDOW, None)
        values = {f"{a}-{b - 1}": v for (a, b), v in zip(RANGES, by_range.by_range, strict=True)}
        values |= {"all": float(by_range), "windows of 256": float(alone)}
        return {name: f"{value:.4f}" for name, value in values.items()}

    def _perplexity(self, model: torch.nn.Module, given: Any, length: int, ranges: Any) -> Any:
        if given is not None:
            longrope.apply(model, given)
        try:
            texts = [text[:length] for text in self.texts]
            return longrope.perplexity(model, texts, length=length, stride=length, ranges=ranges)
        finally:
            if given is not None:
                longrope.remove(model)


def trained(way: str, args, ladder, one, documents, **how: Any) -> Iterator[tuple[str, Any, Any]]:
    """Train one way; yield how it is run, the model, the factors and those of short windows."""
    model = load_packaged_model()
    by_position = way in ("position", "mixed")
    given = ladder if by_position else longrope.Tiers([one])
    if way == "plain":
        settings = longrope.rope_settings(model)
        given = longrope.Tiers([longrope.RescaleFactors.none(**settings.lengths(LENGTH))])
    config = longrope.FinetuneConfig(
        batch_size=args.batch_size,
        warmup_steps=min(5, how["steps"] // 4),
        save_steps=5,
        tiers={"mixed": "position", "plain": "one"}.get(way, way),
        short_share=SHORT_ROWS if way in ("row", "mixed") else 0.0,
        **how,
    )
    name = f"{way}-{how['steps']}-{how['learning_rate']:g}-{how['seed']}"
    stage = FinetuneStage(name, LENGTH, None, config)
    model = finetune(model, documents, given, stage, args.out / name, progress=False)
    if by_position:
        yield "by position", model, ladder, ladder
    elif way == "plain":
        yield "no factors", model, None, None
    elif way == "row":
        loaded = longrope.rope_settings(model).loaded
        yield "by row", model, one, None
        yield "by position", model, longrope.Tiers([loaded, one]), None
    else:
        yield "one set", model, one, one
        longrope.apply(model, one.replace(target_length=LENGTH))
        found = longrope.recover(model, documents, lengths=[256, 512], steps=20, samples=3)
        longrope.remove(model)
        yield "recovered, by position", model, found.tiers, found.tiers


def rows(args: argparse.Namespace, done: set[tuple[str, ...]]) -> Iterator[list[dict]]:
    """Yield the rows of each training that `done` does not hold."""
    documents = as_documents(corpus.documents("search", min_length=LENGTH))
    ladder, one = factors(args.out, documents)
    measure = Measure(args.test_windows)

    def row(way: str, run: str, how: dict, values: dict[str, str]) -> dict:
        return {
            "way": way, "run": run, **how, **values, "batch_size": args.batch_size,
            "test_windows": args.test_windows, **where(),
        }  # fmt: skip

    how: dict[str, Any] = {"steps": 0, "learning_rate": 0, "seed": 0}
    if key("none", how) not in done:
        model = load_packaged_model()
        ways = {"as loaded": None, "by position": ladder, "one set": one}
        yield [row("none", run, how, measure(model, f, f)) for run, f in ways.items()]
    for seed, steps, rate, way in itertools.product(args.seeds, args.steps, args.rates, args.ways):
        how = {"steps": steps, "learning_rate": rate, "seed": seed}
        if key(way, how) not in done:
            found = trained(way, args, ladder, one, documents, **how)
            yield [row(way, run, how, measure(m, f, short)) for run, m, f, short in found]


def key(way: str, how: dict) -> tuple[str, ...]:
    """Return what tells one training from another."""
    return (way, *(f"{float(how[name]):g}" for name in ("steps", "learning_rate", "seed")))


def print_table(rows: list[dict]) -> None:
    """Print medians over seeds, a row for each training and way to run it."""
    columns = [*(f"{a}-{b - 1}" for a, b in RANGES), "all", "windows of 256"]
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        label = (str(row["steps"]), f"{float(row['learning_rate']):g}", row["way"], row["run"])
        groups.setdefault(label, []).append(row)
    print(f"| steps | rate | trained by | run | seeds | {' | '.join(columns)} |")
    print("| --- " * (5 + len(columns)) + "|")
    for label in sorted(groups, key=lambda k: (int(k[0]), float(k[1]), *k[2:])):
        cells = [
            f"{statistics.median(float(row[column]) for row in groups[label]):.3f}"
            for column in columns
        ]
        print(f"| {' | '.join(label)} | {len(groups[label])} | {' | '.join(cells)} |")


def main() -> None:
    """Train what is missing and report."""
    args = arguments()
    if args.table:
        return print_table(saved(FILE))
    if args.out is None:
        raise SystemExit("--out: expected a folder")
    made: list[dict] = []
    for found in rows(args, {key(row["way"], row) for row in saved(FILE)}):
        for row in found:
            print("  ".join(str(v) for v in list(row.values())[:10]), flush=True)
        if args.save:
            append(found, FILE, list(found[0]))
        made += found
    print_table(made)
    return None


if __name__ == "__main__":
    main()
