"""benchmarks/readme_example.py at a length for a CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = ["--d-model", "64", "--num-layers", "2", "--base-length", "64", "--block", "64"]


@pytest.fixture
def example():
    path = BENCHMARKS / "readme_example.py"
    spec = importlib.util.spec_from_file_location("readme_example", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_it_says_what_it_takes_and_runs(example, capsys, one_thread):
    assert example.main([*SMALL, "--device", "cpu", "--length", "1000"]) == (2, 1000, 64)
    printed = capsys.readouterr().out
    assert "random weights" in printed and "2 x 1000 tokens would take" in printed
    assert printed.index("would take") < printed.index("-> [2, 1000, 64], finite")


def test_a_small_budget_gets_the_largest_length_that_fits(example, capsys, monkeypatch, one_thread):
    monkeypatch.setattr(example, "measured", lambda *_: example.Pace(linear=1e-3, square=0.0))
    shape = example.main([*SMALL, "--device", "cpu", "--length", str(1 << 21), "--seconds", "2"])
    assert shape == (2, 448, 64)  # 2 s / (2 rows x 2 layers x 1 ms) = 500 tokens, in blocks of 64
    assert "The largest length that fits memory and 2 s: 448" in capsys.readouterr().out


def test_a_length_within_the_base_needs_no_tiers(example, capsys, one_thread):
    assert example.main([*SMALL, "--device", "cpu", "--length", "50"]) == (2, 50, 64)
    assert "random weights" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        example.main(["--length", "0"])
    assert "--length: expected more than 0, got 0" in capsys.readouterr().err


def test_memory_bounds_the_length(example, monkeypatch, one_thread):
    args = example.parser().parse_args([*SMALL, "--length", "100000"])
    model = example.longrope.LongRoPEModel(64, 8, 2, 64)
    most = example.cost(model, 2, 640, 64).bytes
    monkeypatch.setattr(example, "free_memory", lambda _: int(most / example.USABLE) + 1)
    assert example.largest(model, args, example.Pace(0.0, 0.0), 64) == 640


def test_the_operations_of_the_example(example):
    model = example.longrope.LongRoPEModel(d_model=512, n_heads=8, num_layers=6, base_length=4096)
    assert example.cost(model, 2, 2048 * 1024, 2048).flop == pytest.approx(5.4e16, rel=0.02)
