"""docs/search.md shows the rows of benchmarks/results/ladder_comparison.csv."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_of_the_ladder_is_that_of_the_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location(
        "ladder_comparison", ROOT / "benchmarks/ladder_comparison.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in set(sys.modules) - before:  # of benchmarks: their names are not ours
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    table = [line for line in module.tables(module.saved(module.FILE)) if line.startswith("|")]
    assert len(table) > 5
    shown = (ROOT / "docs/search.md").read_text().splitlines()
    at = shown.index(table[0])
    assert shown[at : at + len(table)] == table
