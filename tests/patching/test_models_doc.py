"""docs/models.md has the registry's table; `python tests/patching/test_models_doc.py` writes it."""

from __future__ import annotations

from pathlib import Path

from longrope.patching import FAMILIES

DOC = Path(__file__).parents[2] / "docs" / "models.md"
END = "<!-- /registry -->\n"
ROW = "| {} | {} | {} | {} | {} |\n"


def table() -> str:
    """Return the table of families that stands in the document."""
    rows = [ROW.format("family", "`model_type`", "transformers", "`ops.attention`",
                       "tiers by position"), ROW.format(*["---"] * 5)]  # fmt: skip
    for family in FAMILIES:
        types = ", ".join(f"`{name}`" for name in family.model_types)
        since = "4.57, 5" if family.since == 4 else f"{family.since}"
        yes = ["yes" if each else "no" for each in (family.kernels, family.tiers)]
        rows.append(ROW.format(family.name, types, since, *yes))
    return "".join(rows)


def with_table(text: str) -> str:
    """Return the document with the present table."""
    begin = text.index("-->\n", text.index("<!-- from the registry")) + len("-->\n")
    return text[:begin] + "\n" + table() + "\n" + text[text.index(END) :]


def test_the_table_is_that_of_the_registry():
    text = DOC.read_text(encoding="utf-8")
    assert with_table(text) == text, "run python tests/patching/test_models_doc.py"


def test_a_stale_table_is_seen():
    text = DOC.read_text(encoding="utf-8")
    assert with_table(text.replace("| Llama |", "| Lama |")) == with_table(text)
    assert "| gpt-oss | `gpt_oss` | 4.57, 5 | no | no |" in table()


if __name__ == "__main__":
    DOC.write_text(with_table(DOC.read_text(encoding="utf-8")), encoding="utf-8")
