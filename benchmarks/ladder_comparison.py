"""The searched ladder beside one searched set, by range of positions, on files no search has seen.

For every seed both searches get the same documents with the same held-out ones, and all factors are
measured on the same test documents: one set for every position; its powers by position
(`RescaleFactors.ladder`); YaRN by position; the ladder of `longrope.search(ladder=True)`. Costs are
forward passes of one whole window (a backward counts 2, validation and prefixes count) and seconds
of the processor.

    python benchmarks/ladder_comparison.py --save
    python benchmarks/ladder_comparison.py --seeds 3 --runs FOLDER --save  # may be killed: resumes
    python benchmarks/book_model.py --books FOLDER --out MODEL
    python benchmarks/ladder_comparison.py --model MODEL --books FOLDER --save
    python benchmarks/ladder_comparison.py --table
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import RESULTS, append, where
from search_comparison import clock, load

import longrope
from longrope.patching import rope_settings

ONE_SET, POWERS, YARN, LADDER = (
    "one searched set", "its powers by position", "YaRN by position", "searched ladder",
)  # fmt: skip
FILE = RESULTS / "ladder_comparison.csv"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", help="folder of a model (default: the packaged one)")
    p.add_argument("--books", type=Path, help="the folder of text that --model was trained on")
    p.add_argument("--ratio", type=int, default=8, help="target over original length")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--excerpts", type=int, default=24, help="excerpts to search on")
    p.add_argument("--validation-excerpts", type=int, default=8, help="held out in the search")
    p.add_argument("--samples", type=int, default=3, help="search windows")
    p.add_argument("--test-samples", type=int, default=16, help="test documents")
    p.add_argument("--steps", type=int, default=80, help="steps of each descent")
    p.add_argument("--start-tokens", default="search", help='a number, or "search"')
    p.add_argument("--runs", type=Path, help="keep the searches here; the same command resumes")
    p.add_argument("--device", default="cpu")
    p.add_argument("--save", action="store_true", help="append rows to benchmarks/results/")
    p.add_argument("--table", action="store_true", help="only print the tables of what was saved")
    return p.parse_args()


def model_name(args: argparse.Namespace) -> str:
    """Return what rows call the model."""
    return Path(args.model).name if args.model else "packaged"


def budget(args: argparse.Namespace) -> str:
    """Return what rows say of the searches."""
    return (
        f"{args.steps} steps; {args.samples} windows; {args.ratio}x; start tokens "
        f"{args.start_tokens}"
    )


def saved(args: argparse.Namespace) -> set[tuple[str, str]]:
    """Return the kind of factors and the seed of the rows that there are of this comparison."""
    if not (args.save and FILE.exists()):
        return set()
    return {
        (row["factors"], row["seed"])
        for row in read()
        if (row["model"], row["budget"]) == (model_name(args), budget(args))
    }


def one_seed(model: torch.nn.Module, documents, seed: int, args) -> Iterator[dict]:
    """Yield a row for each kind of factors; not again where the file has the rows of a search."""
    known = saved(args)
    searched, validation, test = documents(seed)
    settings = rope_settings(model)
    length = args.ratio * settings.original_length
    ends = [settings.original_length * 2**k for k in range(16)]
    edges = [1, *(end for end in ends if end < length), length]
    ranges = list(itertools.pairwise(edges))
    start_tokens = args.start_tokens if args.start_tokens == "search" else int(args.start_tokens)

    def row(name: str, factors, passes: float, seconds: str) -> dict:
        longrope.apply(model, factors)
        try:
            found = longrope.perplexity(model, test, length=length, stride=length, ranges=ranges)
        finally:
            longrope.remove(model)
        by_range = zip(ranges, found.by_range, strict=True)
        return {
            "factors": name,
            "seed": str(seed),
            "passes": f"{passes:.0f}",
            "seconds": seconds,
            "perplexity": f"{found:.4f}",
            "by_range": " ".join(
                f"{begin}-{end - 1}:{value:.4f}" for (begin, end), value in by_range
            ),
            "model": model_name(args),
            "budget": budget(args),
            **where(args.device),
        }

    yarn = longrope.RescaleFactors.yarn(**settings.lengths(length))
    tiers = [longrope.RescaleFactors.yarn(**settings.lengths(end)) for end in edges[2:]]
    loaded = settings.loaded
    for ladder in (False, True):
        if (LADDER if ladder else POWERS, str(seed)) in known:
            continue
        started, out = clock(), None
        if args.runs is not None:
            out = args.runs / f"{model_name(args)}-{seed}-{'ladder' if ladder else 'set'}"
        result = longrope.search(
            model, searched, validation=validation, target_length=length, seed=seed,
            samples=args.samples, steps=args.steps, start_tokens=start_tokens, ladder=ladder,
            progress=False, out=out,
        )  # fmt: skip
        # A search that was resumed took longer than this process.
        seconds = "" if out else f"{clock() - started:.1f}"
        spent = sum(e.forward_equivalents for e in result.history), seconds
        if ladder:
            yield row(LADDER, result.tiers, *spent)
        else:
            yield row("YaRN for every position", yarn, 0, "")
            yield row(YARN, longrope.Tiers([loaded, *tiers]), 0, "")
            yield row(ONE_SET, result.factors, *spent)
            yield row(POWERS, result.factors.ladder(loaded=loaded), *spent)


def tables(rows: list[dict]) -> list[str]:
    """Return the lines of a Markdown table for each model and budget: medians over seeds."""
    groups: dict[tuple[str, str], dict[str, dict[str, dict]]] = {}
    for row in rows:
        by_name = groups.setdefault((row["model"], row["budget"]), {})
        by_name.setdefault(row["factors"], {})[row["seed"]] = row
    lines = []
    for (model, budget), by_name in groups.items():
        if LADDER not in by_name:  # a comparison that has begun
            continue
        some = next(iter(by_name[LADDER].values()))
        names = [part.partition(":")[0] for part in some["by_range"].split()]
        lines += [
            f"{model} model; {budget}; {some['device']}, {some['threads']} threads; medians", "",
            f"| factors | seeds | passes | {' | '.join(names)} | all | against one set |",
            "| --- " * (len(names) + 5) + "|",
        ]  # fmt: skip
        one = by_name[ONE_SET]
        for name, by_seed in by_name.items():
            parts = [
                [float(p.partition(":")[2]) for p in row["by_range"].split()]
                for row in by_seed.values()
            ]
            cells = [f"{statistics.median(column):.3f}" for column in zip(*parts, strict=True)]
            whole = statistics.median(float(row["perplexity"]) for row in by_seed.values())
            changes = [
                float(row["perplexity"]) / float(one[seed]["perplexity"]) - 1
                for seed, row in by_seed.items()
                if seed in one
            ]
            passes = statistics.median(float(row["passes"]) for row in by_seed.values())
            lines.append(
                f"| {name} | {len(by_seed)} | {passes:.0f} | {' | '.join(cells)} | {whole:.3f} | "
                f"{100 * statistics.median(changes):+.1f} % |"
            )
    return lines


def read() -> list[dict]:
    """Return the rows that were saved."""
    with FILE.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Run every seed and report."""
    args = arguments()
    if args.table:
        print("\n".join(tables(read())))
        return
    if (args.model is None) != (args.books is None):
        raise SystemExit("--model and --books go together")
    model, documents = load(args)
    rows = []
    for seed in args.seeds:
        for row in one_seed(model, documents, seed, args):
            print("  ".join(str(row[k]) for k in list(row)[:6]), flush=True)
            if args.save:
                append([row], FILE, list(row))
            rows.append(row)
    print("\n".join(tables(read() if args.save else rows)))


if __name__ == "__main__":
    main()
