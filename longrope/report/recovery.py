"""The report of `longrope.recover`: what short texts lost to the extension, and have back."""

from __future__ import annotations

from pathlib import Path

from longrope.factors import Tiers
from longrope.report.page import Page, Row, Section, Table
from longrope.report.parts import flat, json_object, tier_figure, tier_rows
from longrope.runs import journal
from longrope.runs.folder import CONFIG, JOURNAL

KIND = "recovery"
TIERS, TABLE = "tiers.json", "recovery.md"
#: Settings that are hashes or whole sets of factors, which the figures show.
_LONG = ("tiers", "documents", "test", "weights", "original")


def page(out: Path, shown: str) -> Page:
    """Return the report of a recovery, finished or not."""
    header, entries = journal.read(out / JOURNAL)
    lengths = ", ".join(map(str, header.get("lengths", ())))
    asked = json_object(out / CONFIG).get("options", {}) if (out / CONFIG).is_file() else header
    found = Page(
        title=f"Short context recovered at {lengths} tokens",
        lead="A search of factors for short texts, weights untouched, on a model that was "
        "extended.",
        finished=(out / TIERS).is_file() and (out / TABLE).is_file(),
        facts=[("measurements", str(len(entries)))],
        settings=flat({k: v for k, v in asked.items() if k not in _LONG}),
    )
    if (out / TABLE).is_file():
        head, rows = markdown_table(out / TABLE)
        found.sections.append(
            Section("Perplexity of short windows", tables=[Table(head, rows, best=-1, digits=3)])
        )
        for name, *values in rows:
            for length, value in zip(head[1:], values, strict=True):
                found.rows.append(Row("perplexity", name, 0, int(length), value))
        found.facts += [(f"at {length}, by position", f"{value:.3f}")
                        for length, value in zip(head[1:], rows[-1][1:], strict=True)]  # fmt: skip
    if (out / TIERS).is_file():
        tiers = Tiers.load(out / TIERS)
        found.sections.append(Section("Rescale factors", figures=[tier_figure("tiers", tiers)]))
        found.rows += tier_rows(tiers)
    if not found.sections:
        found.sections.append(Section("Perplexity of short windows", ["Nothing to show yet."]))
    return found


def markdown_table(path: Path) -> tuple[list[str], list[list]]:
    """Return the head and the rows of a Markdown table of a name and numbers in each row."""
    try:
        lines = path.read_text(encoding="utf-8").strip().split("\n")
        head, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
        made = [[name, *map(float, values)] for name, *values in rows]
        if not made or any(len(row) != len(head) for row in made):
            raise ValueError("rows of several lengths")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: expected a table as recover writes it ({error})") from None
    return head, made
