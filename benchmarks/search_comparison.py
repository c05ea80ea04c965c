"""The search methods side by side: cost, and perplexity on files that no search has seen.

For every seed each method searches on the same documents with the same held-out ones, and the
factors are measured on test documents. Costs are forward passes of one window (a backward counts 2,
validation counts) and time: on a CPU the processor's, all threads together, which is the wall time
of one thread on a machine that does nothing else.

The row "algorithm 1, as published" is Algorithm 1 with one Hugging Face forward and loss per
candidate. Its evaluations are those of the row "algorithm 1" up to rounding, so it is not run to
its end: its time is the measured time of a few of these candidates, scaled to all of them.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from pathlib import Path

import torch
from harness import RESULTS, commit, device_name
from populations import losses_of_hugging_face

import longrope
from longrope.cli import load_model
from longrope.demo import run as demo

METHODS = ("evolution", "gradient", "gradient, attention factor learned", "hybrid")
PUBLISHED = "algorithm 1, as published"
FILE = RESULTS / "search_comparison.csv"
#: Documents from the packaged model's files for the search; 8 more are held out in it.
SEARCH_FILES, VALIDATION_FILES = 24, 8


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", help="folder of a model (default: the packaged one)")
    p.add_argument("--search-data", type=Path, help="text to search on (default: the demo's files)")
    p.add_argument("--test-data", type=Path, help="text to test on, in other files")
    p.add_argument("--target-length", type=int, default=demo.TARGET_LENGTH)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--samples", type=int, default=5, help="search windows")
    p.add_argument("--test-samples", type=int, default=16, help="test documents")
    p.add_argument("--iterations", type=int, default=40, help="generations of Algorithm 1")
    p.add_argument("--population", type=int, default=64)
    p.add_argument("--steps", type=int, default=80, help="steps of the descent")
    p.add_argument("--published", type=int, default=6, help="candidates timed as published")
    p.add_argument("--device", default="cpu")
    p.add_argument("--save", action="store_true", help="append rows to benchmarks/results/")
    p.add_argument("--table", action="store_true", help="only print the table of what was saved")
    return p.parse_args()


def clock() -> float:
    """Return seconds: of the processor on a CPU, where others may share the machine."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def load(args):
    """Return the model and a function that gives search, validation and test documents by seed."""
    if args.model is None:
        model, tokenizer = demo.load_packaged_model().to(args.device), None
    else:
        model, tokenizer = load_model(args.model, args.device)
    if args.search_data is None:

        def documents(seed):
            found = demo.excerpts("search", SEARCH_FILES + VALIDATION_FILES, seed)
            test = demo.excerpts("test", args.test_samples, seed)
            return found[:SEARCH_FILES], found[SEARCH_FILES:], test

        return model, documents
    searched, tested = (
        longrope.load_data(path, tokenizer=tokenizer, min_length=args.target_length)
        for path in (args.search_data, args.test_data)
    )
    quarter = max(1, len(searched) // 4)
    return model, lambda seed: (searched[quarter:], searched[:quarter], tested[: args.test_samples])


def seconds_as_published(model, candidates, windows):
    """Return seconds per window of one Hugging Face forward and loss per candidate."""
    longrope.apply(model, candidates[0])
    length = windows.shape[1]
    expected = longrope.perplexity(model, list(windows), length=length, stride=length)
    longrope.remove(model)
    started = clock()
    losses = losses_of_hugging_face(model, candidates, windows)
    seconds = clock() - started
    assert abs(math.exp(losses[0]) / expected - 1) < 0.02  # rounding in the model's dtype
    return seconds / (len(candidates) * len(windows))


def options_of(method, args):
    """Return the arguments of `longrope.search` for one row."""
    name = method.split(",")[0]
    options = {"method": name, "samples": args.samples}
    if name == "evolution":
        options |= {"iterations": args.iterations, "population": args.population}
    else:
        options |= {"steps": args.steps}
    if "learned" in method:
        options["attention_factor"] = "search"
    return options


def one_seed(model, documents, seed, args):
    """Return `{row: (forward equivalents, seconds, test perplexity)}`."""
    searched, validation, test = documents(seed)
    test = [d[: args.target_length] for d in test]

    def tested(factors):
        longrope.apply(model, factors)
        try:
            return longrope.perplexity(
                model, test, length=args.target_length, stride=args.target_length
            )
        finally:
            longrope.remove(model)

    rows = {}
    for method in args.methods:
        started = clock()
        result = longrope.search(
            model, searched, validation=validation, target_length=args.target_length, seed=seed,
            progress=False, **options_of(method, args),
        )  # fmt: skip
        seconds = clock() - started
        cost = sum(e.forward_equivalents for e in result.history)
        perplexity = tested(result.factors)
        name = method.replace("evolution", "algorithm 1")
        rows[name] = (cost, seconds, perplexity)
        print(f"  seed {seed} {name:36s} {cost:6d} {seconds:7.1f} s  {perplexity:.4f}", flush=True)
        if method == "evolution" and args.published:
            windows = torch.stack([torch.as_tensor(d) for d in test[: args.samples]])
            some = [e for e in result.history if e.role == "search"][: args.published]
            candidates = [
                result.factors.replace(lambdas=e.lambdas, start_tokens=e.start_tokens) for e in some
            ]
            each = seconds_as_published(model, candidates, windows.to(args.device))
            rows[PUBLISHED] = (cost, cost * each, perplexity)
    yarn = longrope.RescaleFactors.yarn(
        **{
            name: getattr(result.factors, name)
            for name in ("original_length", "target_length", "rope_theta", "rotary_dim")
        }
    )
    rows["YaRN, no search"] = (0, 0.0, tested(yarn))
    return rows


def as_rows(seed: int, measured: dict, args: argparse.Namespace) -> list[dict]:
    """Return a CSV row for each measurement of one seed, with the budget and where it ran."""
    about = {
        "model": Path(args.model).name if args.model else "packaged",
        "budget": f"{args.population} individuals, {args.iterations} generations; {args.steps} "
        f"steps; {args.samples} windows of {args.target_length}",
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    return [
        {
            "method": method,
            "seed": seed,
            "forward_equivalents": cost,
            "seconds": f"{seconds:.1f}",
            "test_perplexity": f"{perplexity:.4f}",
            **about,
        }
        for method, (cost, seconds, perplexity) in measured.items()
    ]


def save(rows: list[dict]) -> None:
    """Append rows to the CSV file."""
    FILE.parent.mkdir(exist_ok=True)
    new = not FILE.exists()
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict]) -> None:
    """Print median and spread over seeds, by budget and method."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["budget"], row["method"]), []).append(row)
    shown = None
    for (model, budget, method), group in groups.items():
        if shown != (model, budget):
            shown = (model, budget)
            print(f"\n{model} model; {budget}; {group[0]['device']}, {group[0]['threads']} threads")
            print(
                f"{'':36s}{'seeds':>6s}{'forwards':>9s}{'seconds':>9s}  test: median, least, most"
            )
        cost, seconds = (
            statistics.median(float(row[name]) for row in group)
            for name in ("forward_equivalents", "seconds")
        )
        values = [float(row["test_perplexity"]) for row in group]
        spread = f"{statistics.median(values):.4f}  {min(values):.4f}  {max(values):.4f}"
        print(f"{method:36s}{len(group):6d}{cost:9.0f}{seconds:9.1f}  {spread}")


def main() -> None:
    """Run every seed and report."""
    args = arguments()
    if args.table:
        with FILE.open(newline="") as file:
            return print_table(list(csv.DictReader(file)))
    if (args.search_data is None) != (args.test_data is None):
        raise SystemExit("--search-data and --test-data go together")
    model, documents = load(args)
    rows = []
    for seed in args.seeds:
        done = as_rows(seed, one_seed(model, documents, seed, args), args)
        if args.save:
            save(done)
        rows += done
    print_table(rows)


if __name__ == "__main__":
    main()
