"""Perplexities by range of positions, as the card of an export shows them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """The perplexities of one way to run a model.

    Attributes
    ----------
    name
        What was run, in words.
    by_range
        One perplexity for each range; NaN where none was measured.
    overall
        That of all tokens; NaN where only some ranges were measured.
    """

    name: str
    by_range: tuple[float, ...]
    overall: float


@dataclass(frozen=True)
class Measured:
    """What an export loses and gains, see `longrope.measure_export`.

    Attributes
    ----------
    length
        Window length in tokens; windows do not overlap.
    ranges
        Pairs `(begin, end)` of positions.
    rows
        The ways to run the model.
    documents, tokens
        How many documents there were, and how many tokens were scored.
    data
        What the documents are, in words.
    """

    length: int
    ranges: tuple[tuple[int, int], ...]
    rows: tuple[Row, ...]
    documents: int
    tokens: int
    data: str = ""

    def table(self) -> str:
        """Return a Markdown table, a row for each way to run the model."""
        head = ["", *(f"{begin}-{end - 1}" for begin, end in self.ranges), "all"]
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        for row in self.rows:
            values = (*row.by_range, row.overall)
            lines.append([row.name, *("" if v != v else f"{v:.3f}" for v in values)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
