"""What a model of 16 bits is computed in by the commands: the same everywhere for one run."""

from __future__ import annotations

import json

import pytest
import torch
from support import tiny_models
from support.commands import call, write_letters

from longrope.cli import inputs
from longrope.evaluation import memory

WIDENED = "MODEL: its bfloat16 weights are widened to float32, which this processor computes in"


@pytest.fixture
def narrow_folder(tmp_path):
    model = tiny_models.build(vocab_size=256, pad_token_id=None)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    return tmp_path / "narrow"


@pytest.fixture
def text(tmp_path):
    return write_letters(tmp_path / "book.txt")


def capabilities(monkeypatch, **units):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)


def test_16_bits_are_computed_in_float32_where_the_processor_has_none(
    narrow_folder, monkeypatch, capsys
):
    """One line says so; with the units, on request and where memory is short they stay."""
    folder = str(narrow_folder)
    capabilities(monkeypatch, avx2=True, avx512_bf16=False)
    assert inputs.load_model(folder, "cpu")[0].dtype == torch.float32
    assert WIDENED in capsys.readouterr().err
    assert inputs.load_model(folder, "cpu", "bfloat16")[0].dtype == torch.bfloat16
    assert inputs.load_model(folder, "cpu", "float32")[0].dtype == torch.float32
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    assert inputs.load_model(folder, "cpu")[0].dtype == torch.bfloat16
    monkeypatch.undo()
    capabilities(monkeypatch, avx512_bf16=True)
    model, _ = inputs.load_model(folder, "cpu")
    assert model.dtype == torch.bfloat16 and capsys.readouterr().err == ""
    # Its units are not those of float16, which bfloat16 could not hold.
    assert memory.compute_dtype(model.half()) == torch.float32
    with pytest.raises(ValueError, match=r"--dtype: expected auto, .* or float16, got 'int8'"):
        inputs.load_model(folder, "cpu", "int8")


def test_a_run_goes_on_in_the_dtype_that_it_began_in(narrow_folder, text, tmp_path, monkeypatch):
    """On a processor that would choose another; told to compute in another it is refused."""
    run = tmp_path / "run"
    options = ("--target-length", 64, "--samples", 1, "--steps", 2, "--device", "cpu", "--out", run)
    capabilities(monkeypatch, avx512_bf16=True)
    call("search", narrow_folder, text, *options)
    kept = (run / "journal.jsonl").read_bytes()
    assert json.loads(kept.splitlines()[0])["notes"]["dtype"] == "bfloat16"
    capabilities(monkeypatch)
    call("search", narrow_folder, text, *options)
    assert (run / "journal.jsonl").read_bytes() == kept
    error = call("search", narrow_folder, text, *options, "--dtype", "float32", code=2).stderr
    assert "--dtype: expected bfloat16, as the run in" in error and "got 'float32'" in error
