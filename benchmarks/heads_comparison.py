"""A ladder whose layers or heads have factors of their own, beside the shared one it starts from.

For every seed the shared ladder is searched once, and the searches of layers and of heads go on
from it; all factors are measured on the same test documents, which no search has seen. The row
"mean of head" is what a reader of one set gets where nothing better is known. Costs are forward
passes of one whole window (a backward counts 2, validation and prefixes count), and those of layers
or heads have those of the shared ladder in them.

    python benchmarks/heads_comparison.py --save
    python benchmarks/heads_comparison.py --seeds 3 --runs FOLDER --save  # may be killed: resumes
    python benchmarks/book_model.py --books FOLDER --out MODEL
    python benchmarks/heads_comparison.py --model MODEL --books FOLDER --save
    python benchmarks/heads_comparison.py --table
    python benchmarks/heads_comparison.py --plot docs/heads.png --runs FOLDER
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import RESULTS, append, saved, where
from ladder_comparison import by_range, model_name
from search_comparison import in_dtype, load, measured, parser

import longrope
from longrope.patching import rope_settings
from longrope.report.figures import canvas
from longrope.report.heads import head_figure

SHARED, MEAN = "shared", "mean of head"
FILE = RESULTS / "heads_comparison.csv"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    p = parser(__doc__.splitlines()[0], samples=3)
    p.add_argument("--per", nargs="+", default=["head", "layer"], choices=["layer", "head"])
    p.add_argument("--one-set", action="store_true", help="one set instead of a ladder")
    p.add_argument("--runs", type=Path, help="keep the searches here; the same command resumes")
    p.add_argument("--plot", type=Path, help="only draw the heat maps of the runs in --runs")
    return p.parse_args()


def budget(args: argparse.Namespace) -> str:
    """Return what rows say of the searches."""
    return (
        f"{args.steps} steps; {args.samples} windows; {args.ratio}x; {args.excerpts} excerpts; "
        + ("one set" if args.one_set else "ladder")
        + in_dtype(args)
    )


def run_folder(runs: Path, args: argparse.Namespace, per: str, seed: int) -> Path:
    """Return the folder of a search."""
    kind = "set" if args.one_set else "ladder"
    usual = (args.ratio, args.samples, args.dtype) == (8, 3, "float32")
    more = "" if usual else f"-{args.ratio}x-{args.samples}-{args.dtype}"
    return runs / f"{model_name(args)}-{kind}-{args.excerpts}-{args.steps}{more}-{seed}-{per}"


def one_seed(model: torch.nn.Module, documents, seed: int, runs: Path, args) -> Iterator[dict]:
    """Yield a row for each kind of factors; not again where the file has it."""
    known = {
        row["factors"]
        for row in (saved(FILE) if args.save else ())
        if (row["model"], row["budget"], row["seed"]) == (model_name(args), budget(args), str(seed))
    }
    searched, validation, test = documents(seed)
    length = args.ratio * rope_settings(model).original_length

    def row(name: str, factors, found: longrope.factor_search.SearchResult) -> dict:
        return {
            "factors": name,
            "seed": str(seed),
            "passes": f"{sum(e.forward_equivalents for e in found.history):.0f}",
            "validation": f"{found.validation_perplexity:.4f}",
            **measured(model, factors, test, length),
            "model": model_name(args),
            "budget": budget(args),
            **where(args.device),
        }

    shared = run_folder(runs, args, "model", seed)
    for per in ("model", *args.per):
        name = SHARED if per == "model" else per
        wanted = {"model": {SHARED}, "layer": {per}, "head": {per, MEAN}}[per] - known
        if not wanted and per != "model":  # whose folder the others begin with
            continue
        out = run_folder(runs, args, per, seed)
        if not out.exists() and per != "model":
            shutil.copytree(shared, out)
        result = longrope.search(
            model, searched, validation=validation, target_length=length, seed=seed,
            samples=args.samples, steps=args.steps, ladder=not args.one_set, per=per,
            progress=False, out=out,
        )  # fmt: skip
        factors = result.factors if result.tiers is None else result.tiers
        if name in wanted:
            yield row(name, factors, result)
        if MEAN in wanted and result.factors.per_head:
            several = factors if result.tiers is not None else [factors]
            yield row(MEAN, longrope.Tiers([f.mean() for f in several]), result)


def tables(rows: list[dict]) -> list[str]:
    """Return the lines of a Markdown table for each model and budget: medians over seeds."""
    return by_range(rows, SHARED, SHARED, "shared", worst=True)


def draw(args: argparse.Namespace) -> None:
    """Draw the last tier of the first seed's run in --runs, as heat maps by layer and head."""
    found = run_folder(args.runs, args, "head", args.seeds[0]) / "factors.json"
    drawn = head_figure("heads", longrope.RescaleFactors.load(found))
    with canvas(args.plot, size=drawn.size) as figure:
        drawn.draw(figure)


def main() -> None:
    """Run every seed and report."""
    args = arguments()
    if args.table:
        print("\n".join(tables(saved(FILE))))
        return
    if args.plot:
        draw(args)
        return
    model, documents = load(args)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for row in one_seed(model, documents, seed, args.runs or Path(folder), args):
                print("  ".join(str(row[k]) for k in list(row)[:6]), flush=True)
                if args.save:
                    append([row], FILE, list(row))
                rows.append(row)
    print("\n".join(tables(saved(FILE) if args.save else rows)))


if __name__ == "__main__":
    main()
