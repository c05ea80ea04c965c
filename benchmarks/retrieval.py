"""Passkey beyond the window, without fine-tuning: `python benchmarks/retrieval.py --out DIR`.

The packaged retriever (window 512), or another model of bytes, at up to 8 times its window: as
loaded; YaRN for every position; and by position YaRN, Llama 3's rule, MrRoPE-Pro, and tiers that a
search finds by the loss of keys in prompts of other seeds. A killed run resumes. docs/evaluation.md
has the tables.

    python benchmarks/retrieval.py --out DIR --save
    python -m longrope.demo.train_retriever --kind qwen3 --out MODEL  # with norms of q and k
    python benchmarks/retrieval.py --out DIR --model MODEL --save
    python benchmarks/retrieval.py --table
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, WHERE, append, saved, where
from transformers import AutoModelForCausalLM

import longrope
from longrope.demo import RETRIEVER
from longrope.evaluation.passkey import token_exact
from longrope.evaluation.prompts import PromptTokens
from longrope.evaluation.suite_report import Evaluation
from longrope.factors.baselines import BASELINES

RATIO = 8
FILE = RESULTS / "retrieval.csv"
FIELDS = ["model", "factors", "length", "right", "trials", "low", "high", "nll", "budget", *WHERE]
#: Where the searched tiers end, in windows. With ends at 2, 4 and 8 keys at the begin of a prompt
#: of 8 windows lie at the edge of what its tier was made for.
RUNGS = (1.25, 2.5, 5, 10)
#: Prompts that the search sees, none of which is measured, and how many of them measure a candidate
#: (as many decide, held out): a few windows of 5 bytes say little.
SEARCH_SEED, SEARCH_PROMPTS, SEARCH_SAMPLES = 10_000, 32, 8
#: The bytes of a key, which alone are scored there.
KEY_BYTES = 5
#: Rules that are measured by position.
RULES = ("yarn", "llama3", "mrrope-pro")


def searched(model: torch.nn.Module, steps: int, out: Path) -> longrope.Tiers:
    """Search tier after tier, each by the loss of the keys of prompts that are as long as it."""
    tokens, window = PromptTokens(None, model), longrope.rope_settings(model).loaded_length
    found = None
    try:
        for ratio in RUNGS:
            end = int(ratio * window)
            prompts = [
                token_exact(tokens, end, 10, i, np.random.default_rng((SEARCH_SEED, i)))
                for i in range(SEARCH_PROMPTS)
            ]
            found = longrope.search(
                model, [np.array(p.ids) for p in prompts], target_length=end, ladder=True,
                last_tokens=KEY_BYTES, start_tokens=0, steps=steps, samples=SEARCH_SAMPLES,
                out=out / f"search-{end}", progress=True,
            ).tiers  # fmt: skip
            longrope.apply(model, found)  # the next search goes on above them
    finally:
        longrope.remove(model)
    return found


def measure(model: torch.nn.Module, args: argparse.Namespace) -> Evaluation:
    """Measure every set of factors."""
    rope = longrope.rope_settings(model)
    window, target = rope.loaded_length, RATIO * rope.loaded_length
    rules = {name: BASELINES[name](**rope.lengths(target)) for name in RULES}
    sets = {"yarn, every position": rules["yarn"]}
    sets |= {name: factors.ladder(loaded=rope.loaded) for name, factors in rules.items()}
    if args.steps:
        sets["searched"] = searched(model, args.steps, args.out)
    return longrope.evaluate(
        model, [], lengths=[window * 2**k for k in range(4)], factors=sets,
        out=args.out, tasks=["passkey"], trials=args.trials, seed=args.seed, progress=True,
    )  # fmt: skip


def rows_of(result: Evaluation, args: argparse.Namespace) -> list[dict]:
    """Return a row for each set of factors and length."""
    name = "packaged" if args.model == RETRIEVER else Path(args.model).name
    same = {"model": name, "budget": f"seed {args.seed}; {args.steps} steps", **where()}
    rows = []
    for factors in result.sets:
        found = result.passkey(factors)
        for length in found.lengths:
            right = found.accuracy(length)
            rows.append(same | {
                "factors": factors, "length": length, "right": right.right,
                "trials": right.trials, "low": f"{right.low:.4f}", "high": f"{right.high:.4f}",
                "nll": f"{found.nll(length):.4f}",
            })  # fmt: skip
    return rows


def print_tables(rows: list[dict]) -> None:
    """Print a Markdown table for each model and budget."""
    for model, budget in dict.fromkeys((row["model"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["model"], row["budget"]) == (model, budget)]
        lengths = sorted({int(row["length"]) for row in own})
        print(f"\n{model} model; {budget}; {own[0]['trials']} prompts of each length\n")
        heads = [f"{length} ({length // lengths[0]}x)" for length in lengths]
        print("| factors | " + " | ".join(heads) + " |\n" + "| --- " * (1 + len(heads)) + "|")
        for name in dict.fromkeys(row["factors"] for row in own):
            cells = {
                int(row["length"]): f"{row['right']} "
                f"({100 * float(row['low']):.0f}-{100 * float(row['high']):.0f})"
                for row in own
                if row["factors"] == name
            }
            print(f"| {name} | " + " | ".join(cells[length] for length in lengths) + " |")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, help="folder of the run")
    p.add_argument("--model", default=RETRIEVER, help="folder of a model of bytes")
    p.add_argument("--trials", type=int, default=60, help="prompts of each length")
    p.add_argument("--steps", type=int, default=20, help="steps of a search; 0: no search")
    p.add_argument("--seed", type=int, default=0, help="of the prompts that are measured")
    p.add_argument("--save", action="store_true", help="append rows to results/retrieval.csv")
    p.add_argument("--table", action="store_true", help="only print the tables of what was saved")
    args = p.parse_args(argv)
    if args.table:
        return print_tables(saved(FILE))
    if args.out is None:
        p.error("--out: expected a folder")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = rows_of(measure(model, args), args)
    print_tables(rows)
    if args.save:
        append(rows, FILE, FIELDS)
    return None


if __name__ == "__main__":
    main()
