"""A ladder whose layers or heads have factors of their own, beside the shared one it starts from.

For every seed and number of excerpts one search, of which the shared ladder is a part; all factors
are measured on the same test documents, which no search has seen. Costs are forward passes of one
whole window (a backward counts 2, validation and prefixes count).

    python benchmarks/heads_comparison.py --per head --save
    python benchmarks/heads_comparison.py --table
    python benchmarks/heads_comparison.py --plot docs/heads.png --runs FOLDER

With `--runs FOLDER` the searches keep their journals there, and an interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

import torch
from harness import RESULTS, append, saved, where
from search_comparison import load, measured, parser

import longrope
from longrope.patching import rope_settings
from longrope.report.figures import canvas
from longrope.report.heads import head_figure

SHARED = "shared"
FILE = RESULTS / "heads_comparison.csv"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    p = parser(__doc__.splitlines()[0], samples=3)
    p.add_argument("--per", nargs="+", default=["head"], choices=["layer", "head"])
    p.add_argument("--one-set", action="store_true", help="one set instead of a ladder")
    p.add_argument("--runs", type=Path, help="folder of run directories, to resume from")
    p.add_argument("--plot", type=Path, help="only draw the heat maps of the runs in --runs")
    return p.parse_args()


def search_name(args: argparse.Namespace, per: str, seed: int) -> str:
    """Return the name of a search's run directory."""
    kind = "set" if args.one_set else "ladder"
    return f"{kind}-{per}-{args.excerpts}-{args.steps}-{seed}"


def one_search(model: torch.nn.Module, documents, per: str, seed: int, args) -> list[dict]:
    """Return a row for the shared factors, and one for those of layers or heads."""
    searched, validation, test = documents(seed)
    length = args.ratio * rope_settings(model).original_length
    result = longrope.search(
        model, searched, validation=validation, target_length=length, seed=seed,
        samples=args.samples, steps=args.steps, ladder=not args.one_set, per=per, progress=False,
        out=None if args.runs is None else args.runs / search_name(args, per, seed),
    )  # fmt: skip
    rows = []
    for name, found in ((SHARED, result.shared), (per, result)):
        factors = found.factors if found.tiers is None else found.tiers
        rows.append({
            "factors": name,
            "seed": seed,
            "excerpts": args.excerpts,
            "passes": f"{sum(e.forward_equivalents for e in found.history):.0f}",
            "validation": f"{found.validation_perplexity:.4f}",
            **measured(model, factors, test, length),
            "of": per,
            "model": Path(args.model).name if args.model else "packaged",
            "budget": f"{args.steps} steps; {args.samples} windows; {args.ratio}x; "
            + ("one set" if args.one_set else "ladder"),
            **where(args.device),
        })  # fmt: skip
    return rows


def print_tables(rows: list[dict]) -> None:
    """Print a Markdown table: medians over seeds, and changes against the same seed's shared."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["budget"], row["excerpts"], row["of"]), []).append(row)
    print("| model; budget | excerpts | per | seeds | passes | shared | own | median | worst |")
    print("| --- " * 9 + "|")
    for (model, budget, excerpts, per), found in groups.items():
        shared, own = (
            {row["seed"]: row for row in found if (row["factors"] == SHARED) == is_shared}
            for is_shared in (True, False)
        )
        change = [float(own[s]["perplexity"]) / float(shared[s]["perplexity"]) - 1 for s in own]
        middle = [
            statistics.median(float(row["perplexity"]) for row in rows.values())
            for rows in (shared, own)
        ]
        passes = [
            statistics.median(float(row["passes"]) for row in rows.values())
            for rows in (shared, own)
        ]
        print(
            f"| {model}; {budget} | {excerpts} | {per} | {len(own)} | {passes[0]:.0f}, "
            f"{passes[1]:.0f} | {middle[0]:.3f} | {middle[1]:.3f} | "
            f"{100 * statistics.median(change):+.2f} % | {100 * max(change):+.2f} % |"
        )


def draw(args: argparse.Namespace) -> None:
    """Draw the last tier of the first seed's run in --runs, as heat maps by layer and head."""
    seed = args.seeds[0]
    factors = longrope.RescaleFactors.load(
        args.runs / search_name(args, "head", seed) / "factors.json"
    )
    drawn = head_figure("heads", factors)
    with canvas(args.plot, size=drawn.size) as figure:
        drawn.draw(figure)


def main() -> None:
    """Run every seed and report."""
    args = arguments()
    if args.table:
        return print_tables(saved(FILE))
    if args.plot:
        return draw(args)
    model, documents = load(args)
    rows = []
    for seed, per in itertools.product(args.seeds, args.per):
        for row in one_search(model, documents, per, seed, args):
            print("  ".join(str(row[k]) for k in list(row)[:7]), flush=True)
            if args.save:
                append([row], FILE, list(row))
            rows.append(row)
    print_tables(rows)
    return None


if __name__ == "__main__":
    main()
