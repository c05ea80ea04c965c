"""What `longrope demo` does: search factors for the packaged model, then measure every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from longrope.demo import corpus, report
from longrope.factors import RescaleFactors
from longrope.factors.baselines import BASELINES
from longrope.report import at_end
from longrope.runs import style, times

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_FOLDER = Path(__file__).with_name("model")
ORIGINAL_LENGTH = 256
RATIO = 8
TARGET_LENGTH = RATIO * ORIGINAL_LENGTH
LENGTHS = tuple(ORIGINAL_LENGTH * ratio for ratio in (1, 2, 4, 8))

#: The searches by the name that the table gives them, with the demo's budgets: all of it takes
#: under three minutes on two CPU cores. The paper's Algorithm 1 has 64 individuals of which 32
#: survive, 40 iterations and 5 documents. So few candidates get further in small steps from few
#: parents: at 2048 bytes 2.7 % below YaRN; with the mutation probability of 0.3 and twice as
#: many forward passes 0.3 % (12 test excerpts). The race takes 157 passes instead of 174 to the
#: same factors (seed 0).
SEARCHES = {
    "LongRoPE, Algorithm 1": {
        "method": "evolution", "population": 8, "mutations": 6, "crossovers": 2, "parents": 2,
        "mutation_probability": 0.05, "iterations": 10, "race": True,
    },
    "LongRoPE, gradient": {"method": "gradient", "steps": 30},
}  # fmt: skip
BY_GRADIENT = "LongRoPE, gradient"
#: Those factors as tiers by position: none in the original window, then a tier for 2, 4 and 8 times
#: it, whose lambdas lie on the way (`RescaleFactors.ladder`).
BY_POSITION = "LongRoPE, by position"
#: Closed forms that the table has and the plot leaves out, which would not stay legible.
NOT_PLOTTED = {
    style.STYLES[name].label for name in ("dynamic-ntk", "mrrope-uni", "mrrope-pro", "cope")
}
SEARCH_SAMPLES = 3
TEST_SAMPLES = 12


def load_packaged_model() -> PreTrainedModel:
    """Load the packaged byte-level Llama (context 256); stored in bfloat16, computed in float32.

    In float32 on every processor, so that all of them show the same table: bfloat16 is quicker
    where it is native, but a search in it takes other turns.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


def excerpts(wanted: str, count: int, seed: int) -> list[np.ndarray]:
    """Cut one excerpt of the target length from each of `count` random held-out files."""
    documents = corpus.documents(wanted, min_length=TARGET_LENGTH)
    if len(documents) < count:
        raise ValueError(
            f"the demo needs {count} library files of at least {TARGET_LENGTH} bytes to "
            f"{wanted}, and this Python has {len(documents)}"
        )
    random = np.random.default_rng(seed)
    chosen = random.choice(len(documents), count, replace=False)
    starts = [int(random.integers(len(documents[i]) - TARGET_LENGTH + 1)) for i in chosen]
    return [
        documents[i][start : start + TARGET_LENGTH] for i, start in zip(chosen, starts, strict=True)
    ]


def baselines(rotary_dim: int, rope_theta: float) -> dict[str, RescaleFactors]:
    """Return the factors that need no search, by the name that the table gives them."""
    settings = {
        "original_length": ORIGINAL_LENGTH,
        "target_length": TARGET_LENGTH,
        "rope_theta": rope_theta,
        "rotary_dim": rotary_dim,
    }
    made = {"none": RescaleFactors.none(**settings)}
    return made | {style.STYLES[name].label: make(**settings) for name, make in BASELINES.items()}


def measure(
    model: PreTrainedModel, methods: Mapping[str, report.Factors], documents: list[np.ndarray]
) -> dict[str, list[float]]:
    """Return the perplexities of every method in disjoint windows of each of `LENGTHS` tokens.

    The documents are of `TARGET_LENGTH` tokens. A progress bar on standard error moves with each
    of the lengths of a method.
    """
    from rich.console import Console
    from rich.progress import Progress

    from longrope import apply, remove

    table = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(methods) * len(LENGTHS))
        for name, factors in methods.items():
            progress.update(task, description=name)
            apply(model, factors)
            try:
                table[name] = by_length(model, documents, lambda: progress.advance(task))
            finally:
                remove(model)
        progress.update(task, description="")
    return table


def by_length(
    model: PreTrainedModel, documents: list[np.ndarray], advance: Callable[[], None]
) -> list[float]:
    """Return the perplexity in disjoint windows of each of `LENGTHS` tokens.

    A window of 2048 tokens begins with those of 256, 512 and 1024 that begin where it does: no
    token sees a later one, and no method of the demo chooses its factors by the window's length. So
    every part of the text goes through the model as part of the longest window that begins with it,
    5120 tokens of a document instead of 8192. `advance` is called with each of the lengths.
    """
    from longrope import perplexity

    totals, scored = np.zeros(len(LENGTHS)), np.zeros(len(LENGTHS))
    begins = range(0, TARGET_LENGTH, ORIGINAL_LENGTH)
    longest = [max(length for length in LENGTHS if begin % length == 0) for begin in begins]
    for length in LENGTHS:
        starts = [begin for begin, most in zip(begins, longest, strict=True) if most == length]
        windows = [document[at : at + length] for document in documents for at in starts]
        within = [(0, shorter) for shorter in LENGTHS if shorter <= length]
        found = perplexity(model, windows, length=length, stride=length, ranges=within)
        for i, ((_, end), value) in enumerate(zip(within, found.by_range, strict=True)):
            tokens = (end - 1) * len(windows)  # a window's first token has nothing before it
            totals[i] += tokens * math.log(value)
            scored[i] += tokens
        advance()
    return np.exp(totals / scored).tolist()


def run(
    out: Path, *, seed: int = 0, iterations: int | None = None, steps: int | None = None
) -> dict[str, list[float]]:
    """Run the demo and return the table, `{method: [perplexity at each of LENGTHS]}`.

    `iterations` and `steps` change the budgets of Algorithm 1 and of the gradient search. Writes
    `perplexity.csv`, `perplexity.png`, `factors.json` (the best on the searches' validation
    windows), `tiers.json` (those of the search by gradient, by position) and a run directory for
    each search into the folder `out`.
    """
    from rich.console import Console

    from longrope import search
    from longrope.patching import rope_settings

    console = Console()
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out: cannot write to {out} ({error.strerror})") from None

    times.began(out)
    model = load_packaged_model()
    settings = rope_settings(model)
    test_documents = excerpts("test", TEST_SAMPLES, seed)
    search_documents = corpus.documents("search", min_length=TARGET_LENGTH)
    console.print(
        f"A byte-level Llama with {model.num_parameters() / 1e6:.1f} M parameters, trained on "
        f"windows of {ORIGINAL_LENGTH} bytes of Python's standard library."
    )
    given = {"evolution": {"iterations": iterations}, "gradient": {"steps": steps}}
    results, notes = {}, []
    for name, arguments in SEARCHES.items():
        method = arguments["method"]
        changed = {key: value for key, value in given[method].items() if value is not None}
        started = time.monotonic()
        console.print(f"{name}: searching factors for {TARGET_LENGTH} on files that it never saw")
        results[name] = search(
            model,
            search_documents,
            target_length=TARGET_LENGTH,
            samples=SEARCH_SAMPLES,
            seed=seed,
            out=out / f"search-{method}",
            resume=False,  # two minutes; another seed or budget must not be refused
            progress=True,
            **(arguments | changed),
        )
        passes = sum(evaluation.forward_equivalents for evaluation in results[name].history)
        took = time.monotonic() - started
        notes.append(f"{name}: {passes:.0f} forward passes of a window, {took:.0f} s")
    methods: dict[str, report.Factors] = {**baselines(settings.rotary_dim, settings.rope_theta)}
    methods |= {name: result.factors for name, result in results.items()}
    ladder = results[BY_GRADIENT].factors.ladder()
    methods[BY_POSITION] = ladder
    console.print(f"Measuring {len(methods)} methods on {TEST_SAMPLES} other files")
    table = measure(model, methods, test_documents)
    best = min(results.values(), key=lambda result: result.validation_perplexity)
    best.factors.save(out / "factors.json")
    ladder.save(out / "tiers.json")
    report.save_csv(table, LENGTHS, out / "perplexity.csv")
    plotted = {name: methods[name] for name in methods if name not in NOT_PLOTTED}
    rows = {name: table[name] for name in plotted}
    report.save_plot(rows, plotted, LENGTHS, out / "perplexity.png")
    at_end(out)
    console.print(report.as_rich_table(table, LENGTHS))
    console.print(
        "\n".join(notes) + "\n"
        f"(A step by gradient counts as three. The paper's Algorithm 1 would take "
        f"6,560.) Search and test files are disjoint, and the model saw neither in training.\n\n"
        f"Saved: {out / 'perplexity.png'}, {out / 'perplexity.csv'}, {out / 'factors.json'}, "
        f"{out / 'report.html'}\n"
        f"Next: longrope search MODEL DATA --target-length N --out DIR finds factors for your "
        f"model;\n      longrope perplexity MODEL DATA --length N --factors DIR/factors.json "
        f"measures them.",
        highlight=False,
        soft_wrap=True,
    )
    return table
