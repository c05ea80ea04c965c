"""The docs show the rows of benchmarks/results, as the benchmarks' own tables print them."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("benchmark", "page"),
    [
        ("ladder_comparison", "docs/search.md"),
        ("heads_comparison", "docs/heads.md"),
        ("plan_comparison", "docs/extend.md"),
    ],
)
def test_a_table_is_that_of_the_rows(benchmark, page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location(benchmark, ROOT / f"benchmarks/{benchmark}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in set(sys.modules) - before:  # of benchmarks: their names are not ours
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    lines = module.tables(module.saved(module.FILE))
    runs = itertools.groupby(lines, key=lambda line: line.startswith("|"))
    tables = [list(run) for is_table, run in runs if is_table]
    assert tables
    shown = (ROOT / page).read_text().splitlines()
    for table in tables:
        assert len(table) > 3
        assert any(shown[at : at + len(table)] == table for at in range(len(shown))), table
