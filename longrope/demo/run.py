"""What `longrope demo` does: search factors for the packaged model, then measure every method."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from longrope.demo import corpus
from longrope.factors import RescaleFactors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_FOLDER = Path(__file__).with_name("model")
ORIGINAL_LENGTH = 256
RATIO = 8
TARGET_LENGTH = RATIO * ORIGINAL_LENGTH
LENGTHS = tuple(ORIGINAL_LENGTH * ratio for ratio in (1, 2, 4, 8))

#: The searches by the name that the table gives them, with the demo's budgets: all of it takes
#: under three minutes on two CPU cores. The paper's Algorithm 1 has 64 individuals, 40 iterations
#: and 5 documents.
SEARCHES = {
    "LongRoPE, Algorithm 1": {
        "method": "evolution", "population": 32, "mutations": 16, "crossovers": 16, "iterations": 3,
    },
    "LongRoPE, gradient": {"method": "gradient", "steps": 40},
}  # fmt: skip
SEARCH_SAMPLES = 4
TEST_SAMPLES = 16


def load_packaged_model() -> PreTrainedModel:
    """Load the packaged byte-level Llama (context 256) in `native_dtype()`; stored in bfloat16."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from longrope.evaluation.memory import native_dtype

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=native_dtype()).eval()


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
    return {
        "none": RescaleFactors.none(**settings),
        "PI": RescaleFactors.pi(**settings),
        "NTK": RescaleFactors.ntk(**settings),
        "YaRN": RescaleFactors.yarn(**settings),
    }


def measure(model: PreTrainedModel, factors: RescaleFactors, documents: list) -> list[float]:
    """Return the perplexity of the documents in disjoint windows of each of `LENGTHS` tokens."""
    from longrope import apply, perplexity, remove

    apply(model, factors)
    try:
        return [perplexity(model, documents, length=n, stride=n) for n in LENGTHS]
    finally:
        remove(model)


def run(
    out: Path, *, seed: int = 0, iterations: int | None = None, steps: int | None = None
) -> dict[str, list[float]]:
    """Run the demo and return the table, `{method: [perplexity at each of LENGTHS]}`.

    `iterations` and `steps` change the budgets of Algorithm 1 and of the gradient search. Writes
    `perplexity.csv`, `perplexity.png`, `factors.json` (the best on the searches' validation
    windows) and a run directory for each search into the folder `out`.
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

    model = load_packaged_model()
    settings = rope_settings(model)
    test_documents = excerpts("test", TEST_SAMPLES, seed)
    search_documents = corpus.documents("search", min_length=TARGET_LENGTH)
    console.print(
        f"A byte-level Llama with {model.num_parameters() / 1e6:.1f} M parameters, trained on "
        f"windows of {ORIGINAL_LENGTH} bytes of Python's standard library.\n"
        f"Searching factors for {TARGET_LENGTH} on files that it never saw ..."
    )
    given = {"evolution": {"iterations": iterations}, "gradient": {"steps": steps}}
    results, notes = {}, []
    for name, arguments in SEARCHES.items():
        method = arguments["method"]
        changed = {key: value for key, value in given[method].items() if value is not None}
        started = time.monotonic()
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
    methods = baselines(settings.rotary_dim, settings.rope_theta)
    methods |= {name: result.factors for name, result in results.items()}
    table = {}
    with console.status(f"Measuring {len(methods)} methods on {TEST_SAMPLES} other files"):
        for name, factors in methods.items():
            table[name] = measure(model, factors, test_documents)

    best = min(results.values(), key=lambda result: result.validation_perplexity)
    best.factors.save(out / "factors.json")
    save_csv(table, out / "perplexity.csv")
    save_plot(table, methods, out / "perplexity.png")
    console.print(as_rich_table(table))
    console.print(
        "\n".join(notes) + "\n"
        f"(A step by gradient counts as three. The paper's Algorithm 1 would take "
        f"6,560.) Search and test files are disjoint, and the model saw neither in training.\n\n"
        f"Saved: {out / 'perplexity.png'}, {out / 'perplexity.csv'}, {out / 'factors.json'}\n"
        f"Next: longrope search MODEL DATA --target-length N --out DIR finds factors for your "
        f"model;\n      longrope perplexity MODEL DATA --length N --factors DIR/factors.json "
        f"measures them.",
        highlight=False,
        soft_wrap=True,
    )
    return table


def as_rich_table(table: dict[str, list[float]]):
    """Lay the table out for the terminal, the best of each column in bold."""
    from rich.table import Table

    shown = Table(title="Perplexity per byte on unseen files, by window")
    shown.add_column("method")
    for length in LENGTHS:
        shown.add_column(f"{length} ({length // ORIGINAL_LENGTH}x)", justify="right")
    best = [min(column) for column in zip(*table.values(), strict=True)]
    for name, row in table.items():
        cells = [f"{v:.2f}" for v in row]
        marked = zip(cells, row, best, strict=True)
        shown.add_row(name, *(f"[bold]{c}[/bold]" if v == b else c for c, v, b in marked))
    return shown


def save_csv(table: dict[str, list[float]], path: Path) -> None:
    """Write one row per method."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", *LENGTHS])
        writer.writerows([name, *(f"{v:.6f}" for v in row)] for name, row in table.items())


def save_plot(
    table: dict[str, list[float]], methods: dict[str, RescaleFactors], path: Path
) -> None:
    """Plot perplexity by length, and the rescale factors by dimension."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

    colors = {"none": "0.55", "PI": "#d95f02", "NTK": "#e6ab02", "YaRN": "#1b7fbd"}
    searched = iter(("#c2185b", "#2e7d32", "#6a1b9a"))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, row in table.items():
        color = colors.get(name) or next(searched)
        style = {"color": color, "marker": "o", "markersize": 4}
        if name not in colors:
            style["linewidth"] = 2.5
        left.plot(LENGTHS, row, label=name, **style)
        right.plot(methods[name].lambdas, **{**style, "markersize": 2.5})
    left.axhline(table["none"][0], color="0.8", linestyle=":", zorder=0)
    left.set(xlabel="window, tokens", ylabel="perplexity per byte, unseen files", title="")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.xaxis.set_major_locator(FixedLocator(LENGTHS))
    left.yaxis.set_major_locator(FixedLocator([2, 2.5, 3, 4, 6, 10, 20, 40]))
    left.yaxis.set_minor_formatter(NullFormatter())
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    left.legend(frameon=False)
    right.set(xlabel="pair of dimensions i", ylabel="rescale factor $\\lambda_i$")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
