"""What `longrope demo` shows: a table for the terminal, the same as CSV, and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from longrope.factors import RescaleFactors
from longrope.runs import style
from longrope.runs.folder import write_table

#: What a method applies: one set of factors, or a list of them for growing lengths.
Factors = RescaleFactors | Sequence[RescaleFactors]
#: The perplexities of a method, one for each length.
Table = Mapping[str, Sequence[float]]


def as_rich_table(table: Table, lengths: Sequence[int]):
    """Lay the table out for the terminal, the best of each column in bold."""
    from rich.table import Table as RichTable

    shown = RichTable(title="Perplexity per byte on unseen files, by window")
    shown.add_column("method")
    for length in lengths:
        shown.add_column(f"{length} ({length // lengths[0]}x)", justify="right")
    best = [min(column) for column in zip(*table.values(), strict=True)]
    for name, row in table.items():
        cells = [f"{v:.2f}" for v in row]
        marked = zip(cells, row, best, strict=True)
        # What the model is before anything is done: the baseline of every other row.
        shown.add_row(
            name + " (as loaded)" * (name == "none"),
            *(f"[bold]{c}[/bold]" if v == b else c for c, v, b in marked),
        )
    return shown


def save_csv(table: Table, lengths: Sequence[int], path: Path) -> None:
    """Write one row per method."""
    rows = [[name, *(f"{v:.6f}" for v in row)] for name, row in table.items()]
    write_table(path, ["method", *lengths], rows)


def save_plot(
    table: Table, methods: Mapping[str, Factors], lengths: Sequence[int], path: Path
) -> None:
    """Plot perplexity by length, and the rescale factors by pair of dimensions."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    known = {each.label: name for name, each in style.STYLES.items()}
    for label, row in table.items():
        drawn = style.line(known[label])
        left.plot(lengths, row, **drawn)
        # Of tiers the last set is the one that reaches furthest; the others lie below it.
        *_, furthest = sets_of(methods[label])
        right.plot(furthest.lambdas, **(drawn | {"markersize": 2.5}))
    left.axhline(table["none"][0], color="0.8", linestyle=":", zorder=0)
    left.set(xlabel="window, tokens", ylabel="perplexity per byte, unseen files")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.xaxis.set_major_locator(FixedLocator(lengths))
    left.yaxis.set_major_locator(FixedLocator([2, 2.5, 3, 4, 6, 10, 20, 40]))
    left.yaxis.set_minor_formatter(NullFormatter())
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    left.legend(frameon=False)
    right.set(xlabel="pair of dimensions i", ylabel="rescale factor $\\lambda_i$")
    style.tidy(left, right)
    figure.savefig(path, dpi=150)


def sets_of(factors: Factors) -> Iterable[RescaleFactors]:
    """Return the sets that a method applies, also where it is one."""
    return (factors,) if isinstance(factors, RescaleFactors) else factors
