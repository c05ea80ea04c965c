"""The search methods side by side: cost, and perplexity on files that no search has seen.

For every seed each method searches on the same documents with the same held-out ones, and the
factors are measured on test documents. Costs are forward passes of one window (a backward counts 2,
validation counts) and time: on a CPU the processor's, all threads together, which is the wall time
of one thread on a machine that does nothing else. "To Algorithm 1's end" is the cost at which a
method's best candidate so far (on its own search windows) has reached, on the test documents, the
perplexity that Algorithm 1 ends with there; blank where it never does.

The row "Algorithm 1, as published" is Algorithm 1 with one Hugging Face forward and loss per
candidate. Its evaluations are those of the row "Algorithm 1" up to rounding, so it is not run to
its end: its time is the measured time of a few of these candidates, scaled to all of them.

    python benchmarks/search_comparison.py --save
    python benchmarks/book_model.py --books FOLDER --out MODEL
    python benchmarks/search_comparison.py --model MODEL --books FOLDER --save
    python benchmarks/search_comparison.py --table
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import book_model
import numpy as np
import torch
from harness import RESULTS, append, ranged, saved, where
from populations import losses_of_hugging_face

import longrope
from longrope.cli.inputs import load_model
from longrope.demo import run as demo
from longrope.factor_search.windows import draw_windows
from longrope.factors import RescaleFactors, Tiers
from longrope.factors.tiers import ladder_targets
from longrope.patching import rope_settings

ALGORITHM_1 = "Algorithm 1"
PUBLISHED = "Algorithm 1, as published"
#: Arguments of `longrope.search` by the name of the row.
METHODS = {
    ALGORITHM_1: {"method": "evolution"},
    "Algorithm 1, racing": {"method": "evolution", "race": True},
    "gradient": {"method": "gradient"},
    "gradient, YaRN's attention": {"method": "gradient", "attention_factor": "yarn"},
    "hybrid": {"method": "hybrid"},
    "hybrid, YaRN's attention": {"method": "hybrid", "attention_factor": "yarn"},
}
#: On request: in the search space of LongRoPE2.
CRITICAL = {
    f"{name}, critical dimension": {**METHODS[name], "critical_dimension": True}
    for name in (ALGORITHM_1, "gradient")
}
#: On request: the descent with other upper bounds of lambda than 1.25 s, in units of s.
BOUNDS = {f"gradient, lambda to {bound:g} s": bound for bound in (1, 2, 8)}
EVERY = [*METHODS, *CRITICAL, *BOUNDS]
#: Ratios are costs of Algorithm 1 as published over the method's own.
HEAD = """\
| method | seeds | passes | seconds | less than as published: passes, seconds \
| less to Algorithm 1's end: passes, seconds | test perplexity | better than Algorithm 1 |
| --- | --- | --- | --- | --- | --- | --- | --- |"""
FILE = RESULTS / "search_comparison.csv"
#: To search on, in most of the rows.
EXCERPTS = 24


def parser(description: str, samples: int) -> argparse.ArgumentParser:
    """Return the flags of every comparison of searches; `samples` is a default."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--model", help="folder of a model (default: the packaged one)")
    p.add_argument("--books", type=Path, help="the folder of text that --model was trained on")
    p.add_argument("--ratio", type=int, default=8, help="target over original length, up to 8")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--excerpts", type=int, default=EXCERPTS, help="excerpts to search on")
    p.add_argument("--validation-excerpts", type=int, default=8, help="held out in the search")
    p.add_argument("--samples", type=int, default=samples, help="search windows")
    p.add_argument("--test-samples", type=int, default=16, help="test documents")
    p.add_argument("--steps", type=int, default=80, help="steps of each descent")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--save", action="store_true", help="append rows to benchmarks/results/")
    p.add_argument("--table", action="store_true", help="only print the tables of what was saved")
    return p


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    p = parser(__doc__.splitlines()[0], samples=5)
    p.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD",
                   choices=EVERY, help=", ".join(EVERY))  # fmt: skip
    p.add_argument("--iterations", type=int, default=40, help="generations of Algorithm 1")
    p.add_argument("--published", type=int, default=6, help="candidates timed as published")
    return p.parse_args()


def in_dtype(args: argparse.Namespace) -> str:
    """Return what a budget says of the model's dtype: nothing for float32."""
    return "" if args.dtype == "float32" else f"; {args.dtype}"


def measured(
    model: torch.nn.Module, factors: RescaleFactors | Tiers, test: Sequence, length: int
) -> dict[str, str]:
    """Return the perplexity of test documents under factors, whole and by range of positions."""
    window = rope_settings(model).original_length
    ranges = list(itertools.pairwise([1, window, *ladder_targets(window, length)]))
    longrope.apply(model, factors)
    try:
        found = longrope.perplexity(model, test, length=length, stride=length, ranges=ranges)
    finally:
        longrope.remove(model)
    return {"perplexity": f"{found:.4f}", "by_range": ranged(ranges, found.by_range)}


def clock() -> float:
    """Return seconds: of the processor on a CPU, where others may share the machine."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


Excerpts = Callable[[int], tuple[list, list, list]]


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, Excerpts]:
    """Return the model, and a function from a seed to search, validation and test excerpts."""
    searched = args.excerpts + args.validation_excerpts
    tokenizer = None
    if args.model is None:
        model = demo.load_packaged_model().to(args.device, getattr(torch, args.dtype))

        def cut(role: str, count: int, seed: int) -> Sequence:
            length = args.ratio * demo.ORIGINAL_LENGTH
            return [e[:length] for e in demo.excerpts(role, count, seed)]
    else:
        model, tokenizer = load_model(args.model, args.device, args.dtype)
        books = {
            role: book_model.documents(args.books, role, tokenizer)
            for role in (("train",) if tokenizer else ()) + ("search", "test")
        }
        length = args.ratio * rope_settings(model).original_length

        def cut(role: str, count: int, seed: int) -> Sequence:
            texts = [torch.from_numpy(book) for book in books[role]]
            return list(draw_windows(texts, length, count, np.random.default_rng(seed)))

    def documents(seed: int) -> tuple[list, list, list]:
        if tokenizer is not None:  # trained on other text: more of it
            return (
                cut("train", args.excerpts, seed),
                cut("search", args.validation_excerpts, seed),
                cut("test", args.test_samples, seed),
            )
        found = cut("search", searched, seed)
        return (
            found[: args.excerpts],
            found[args.excerpts :],
            cut("test", args.test_samples, seed),
        )

    return model, documents


def seconds_as_published(model, candidates, windows) -> float:
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


class Trace:
    """Counts what a search has cost, and remembers the candidates that were its best so far."""

    def __init__(self):
        self.started = clock()
        self.cost = 0
        self.least = math.inf
        self.incumbents = []

    def __call__(self, evaluations: Sequence) -> None:
        """Take a batch of evaluations, as `longrope.search` reports them."""
        self.cost += sum(e.forward_equivalents for e in evaluations)
        best = min(
            (e for e in evaluations if e.role == "search"), key=lambda e: e.nll, default=None
        )
        if best is not None and best.nll < self.least:
            self.least = best.nll
            self.incumbents.append((self.cost, clock() - self.started, best))

    def until(self, reached: Callable[[object], bool], end: tuple) -> tuple:
        """Return `(cost, seconds)` of the first incumbent that has reached the goal.

        `end` is `(cost, seconds)` of the search's result, where only that has reached it.
        """
        found = ((cost, seconds) for cost, seconds, e in self.incumbents if reached(e))
        return next(found, end)


def one_seed(model, documents: Excerpts, seed: int, args) -> Iterator[dict]:
    """Yield a row of the table for each method."""
    searched, validation, test = documents(seed)
    length = len(test[0])

    def tested(factors: longrope.RescaleFactors) -> float:
        longrope.apply(model, factors)
        try:
            return longrope.perplexity(model, test, length=length, stride=length)
        finally:
            longrope.remove(model)

    goal = None
    for name in args.methods:
        options = dict({**METHODS, **CRITICAL}.get(name) or METHODS["gradient"])
        if name in BOUNDS:
            options["max_lambda"] = BOUNDS[name] * args.ratio
        options |= (
            {"iterations": args.iterations}
            if options["method"] == "evolution"
            else {"steps": args.steps}
        )
        trace = Trace()
        result = longrope.search(
            model, searched, validation=validation, target_length=length, seed=seed,
            samples=args.samples, progress=trace, **options,
        )  # fmt: skip
        end = trace.cost, clock() - trace.started
        perplexity = tested(result.factors)
        until = (None, None)
        if name == ALGORITHM_1:
            goal, until = perplexity, end
        elif goal is not None:

            def reached(e, result=result, goal=goal) -> bool:
                changes = {k: getattr(e, k) for k in ("lambdas", "start_tokens")}
                factors = result.factors.replace(attention_factor=e.attention_factor, **changes)
                return tested(factors) <= goal

            until = trace.until(reached, end if perplexity <= goal else (None, None))
        yield as_row(name, seed, end, until, perplexity, args)
        if name == ALGORITHM_1 and args.published:
            windows = torch.stack([torch.as_tensor(d) for d in test[: args.samples]])
            some = [e for e in result.history if e.role == "search"][: args.published]
            candidates = [
                result.factors.replace(lambdas=e.lambdas, start_tokens=e.start_tokens) for e in some
            ]
            each = seconds_as_published(model, candidates, windows.to(args.device))
            end = end[0], end[0] * each
            yield as_row(PUBLISHED, seed, end, end, perplexity, args)
    names = ("original_length", "target_length", "rope_theta", "rotary_dim")
    yarn = longrope.RescaleFactors.yarn(**{name: getattr(result.factors, name) for name in names})
    yield as_row("YaRN, no search", seed, (0, 0.0), (None, None), tested(yarn), args)


def as_row(name: str, seed: int, end: tuple, until: tuple, perplexity: float, args) -> dict:
    """Return a row of the CSV file: what was measured, the budget and where it ran."""
    return {
        "method": name,
        "seed": seed,
        "forward_equivalents": end[0],
        "seconds": f"{end[1]:.1f}",
        "forward_equivalents_to_end_of_algorithm_1": "" if until[0] is None else until[0],
        "seconds_to_end_of_algorithm_1": "" if until[1] is None else f"{until[1]:.1f}",
        "test_perplexity": f"{perplexity:.4f}",
        "model": Path(args.model).name if args.model else "packaged",
        "budget": f"{args.iterations} generations; {args.steps} steps; {args.samples} windows, "
        f"{args.ratio}x"
        + ("" if args.excerpts == 24 else f"; {args.excerpts} excerpts")
        + in_dtype(args),
        **where(args.device),
    }


def print_tables(rows: list[dict]) -> None:
    """Print a Markdown table for each model and budget: a line per method, medians over seeds."""
    groups: dict[tuple[str, str], dict[str, dict[str, dict]]] = {}
    for row in rows:
        by_method = groups.setdefault((row["model"], row["budget"]), {})
        by_method.setdefault(row["method"], {})[row["seed"]] = row
    for (model, budget), by_method in groups.items():
        some = next(iter(next(iter(by_method.values())).values()))
        print(f"\n{model} model; {budget}; {some['device']}, {some['threads']} threads\n")
        print(HEAD)
        for method, by_seed in by_method.items():
            cells = as_cells(by_seed, by_method.get(PUBLISHED, {}), by_method.get(ALGORITHM_1, {}))
            print(f"| {' | '.join([method, str(len(by_seed)), *cells])} |")


def as_cells(by_seed: dict, published: dict, algorithm_1: dict) -> list[str]:
    """Return the cells of a method's line; the ratios are those of the seeds that both have."""

    def numbers(column: str) -> list[float]:
        return [float(row[column]) for row in by_seed.values()]

    def times_less(columns: Sequence[str]) -> str:
        """Return the medians of the ratios to Algorithm 1 as published; 0 where never reached."""
        medians = []
        for column, cost in zip(("forward_equivalents", "seconds"), columns, strict=True):
            ratios = [
                float(published[seed][column]) / float(row[cost]) if row[cost] else 0.0
                for seed, row in by_seed.items() if seed in published and row[cost] != "0.0"
            ]  # fmt: skip
            medians += [statistics.median(ratios)] if ratios else []
        digits = 1 if max(medians, default=0) < 20 else 0
        return ", ".join(f"{m:.{digits}f}x" for m in medians)

    costs = ("forward_equivalents", "seconds")
    own = by_seed is published or by_seed is algorithm_1
    searched = any(numbers("forward_equivalents"))
    whole = times_less(costs) if searched and by_seed is not published else ""
    reached = sum(row["seconds_to_end_of_algorithm_1"] != "" for row in by_seed.values())
    to_end = ""
    if searched and reached and not own:
        to_end = times_less([f"{c}_to_end_of_algorithm_1" for c in costs])
        to_end += f" (in {reached} of {len(by_seed)})" * (reached < len(by_seed))
    tested = {seed: float(row["test_perplexity"]) for seed, row in by_seed.items()}
    shared = [seed for seed in tested if seed in algorithm_1]
    better = sum(tested[s] < float(algorithm_1[s]["test_perplexity"]) for s in shared)
    values = list(tested.values())
    return [
        *(f"{statistics.median(numbers(column)):.0f}" for column in costs),
        whole,
        to_end,
        f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})",
        "" if own or not shared else f"{better} of {len(shared)}",
    ]


def main() -> None:
    """Run every seed and report."""
    args = arguments()
    if args.table:
        return print_tables(saved(FILE))
    if (args.model is None) != (args.books is None):
        raise SystemExit("--model and --books go together")
    model, documents = load(args)
    rows = []
    for seed in args.seeds:
        for row in one_seed(model, documents, seed, args):
            print("  ".join(f"{row[k]!s:>8s}" for k in list(row)[:7]), flush=True)
            if args.save:
                append([row], FILE, list(row))
            rows.append(row)
    print_tables(rows)


if __name__ == "__main__":
    main()
