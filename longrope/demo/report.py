"""What `longrope demo` shows: a table for the terminal, the same as CSV, and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from longrope.factors import RescaleFactors
from longrope.report import demo, figures, plots
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
    sets = []
    for label, factors in methods.items():
        # Of tiers the last set is the one that reaches furthest; the others lie below it.
        *_, furthest = sets_of(factors)
        sets.append((demo.style_of(label)._asdict() | {"markersize": 4}, furthest.lambdas))
    with figures.canvas(path, size=(9.6, figures.SIZE[1])) as canvas:
        left, right = canvas.subplots(1, 2)
        demo.draw_perplexity(left, lengths, table)
        plots.draw_factors(right, sets)
        figures.legend(canvas, columns=4)


def sets_of(factors: Factors) -> Iterable[RescaleFactors]:
    """Return the sets that a method applies, also where it is one."""
    return (factors,) if isinstance(factors, RescaleFactors) else factors
