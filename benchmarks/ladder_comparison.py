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
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import RESULTS, append, by_ranges, saved, where
from search_comparison import EXCERPTS, clock, in_dtype, load, measured, parser

import longrope
from longrope.factors.tiers import ladder_targets
from longrope.patching import rope_settings

ONE_SET, POWERS, YARN, LADDER = (
    "one searched set", "its powers by position", "YaRN by position", "searched ladder",
)  # fmt: skip
FILE = RESULTS / "ladder_comparison.csv"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    p = parser(__doc__.splitlines()[0], samples=3)
    p.add_argument("--start-tokens", default="search", help='a number, or "search"')
    p.add_argument("--runs", type=Path, help="keep the searches here; the same command resumes")
    return p.parse_args()


def model_name(args: argparse.Namespace) -> str:
    """Return what rows call the model."""
    return Path(args.model).name if args.model else "packaged"


def budget(args: argparse.Namespace) -> str:
    """Return what rows say of the searches."""
    excerpts = "" if args.excerpts == EXCERPTS else f"; {args.excerpts} excerpts"
    return (
        f"{args.steps} steps; {args.samples} windows; {args.ratio}x; start tokens "
        f"{args.start_tokens}{excerpts}{in_dtype(args)}"
    )


def known_rows(args: argparse.Namespace) -> set[tuple[str, str]]:
    """Return the kind of factors and the seed of the rows that there are of this comparison."""
    if not args.save:
        return set()
    return {
        (row["factors"], row["seed"])
        for row in saved(FILE)
        if (row["model"], row["budget"]) == (model_name(args), budget(args))
    }


def one_seed(model: torch.nn.Module, documents, seed: int, args) -> Iterator[dict]:
    """Yield a row for each kind of factors; not again where the file has the rows of a search."""
    known = known_rows(args)
    searched, validation, test = documents(seed)
    settings = rope_settings(model)
    length = args.ratio * settings.original_length
    start_tokens = args.start_tokens if args.start_tokens == "search" else int(args.start_tokens)

    def row(name: str, factors, passes: float, seconds: str) -> dict:
        return {
            "factors": name,
            "seed": str(seed),
            "passes": f"{passes:.0f}",
            "seconds": seconds,
            **measured(model, factors, test, length),
            "model": model_name(args),
            "budget": budget(args),
            **where(args.device),
        }

    ends = ladder_targets(settings.original_length, length)
    yarn = longrope.RescaleFactors.yarn(**settings.lengths(length))
    tiers = [longrope.RescaleFactors.yarn(**settings.lengths(end)) for end in ends]
    loaded = settings.loaded
    for ladder in (False, True):
        if (LADDER if ladder else POWERS, str(seed)) in known:
            continue
        started, out = clock(), None
        if args.runs is not None:
            some = "" if args.excerpts == EXCERPTS else f"{args.excerpts}-"
            out = args.runs / f"{model_name(args)}-{some}{seed}-{'ladder' if ladder else 'set'}"
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
    return by_range(rows, ONE_SET, LADDER, "one set")


def by_range(
    rows: list[dict], base: str, needed: str, against: str, worst: bool = False
) -> list[str]:
    """Return tables of factors by range of positions, beside those named `base` of each seed.

    A model and budget whose rows have none named `needed` is a comparison that has begun: left out.
    `against` heads the column of medians, and `worst` adds one of the worst seed.
    """
    groups: dict[tuple[str, str], dict[str, dict[str, dict]]] = {}
    for row in rows:
        by_name = groups.setdefault((row["model"], row["budget"]), {})
        by_name.setdefault(row["factors"], {})[row["seed"]] = row
    lines = []
    for (model, budget), by_name in groups.items():
        if needed not in by_name:
            continue
        some = next(iter(by_name[needed].values()))
        names = list(by_ranges(some))
        lines += [
            f"{model} model; {budget}; {some['device']}, {some['threads']} threads; medians", "",
            f"| factors | seeds | passes | {' | '.join(names)} | all | against {against} |"
            + " worst seed |" * worst,
            "| --- " * (len(names) + 5 + worst) + "|",
        ]  # fmt: skip
        one = by_name[base]
        for name, by_seed in by_name.items():
            parts = [by_ranges(row).values() for row in by_seed.values()]
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
                + f" {100 * max(changes):+.1f} % |"
                * worst
            )
    return lines


def main() -> None:
    """Run every seed and report."""
    args = arguments()
    if args.table:
        print("\n".join(tables(saved(FILE))))
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
    print("\n".join(tables(saved(FILE) if args.save else rows)))


if __name__ == "__main__":
    main()
