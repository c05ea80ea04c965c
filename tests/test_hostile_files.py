"""Damaged and hostile files: one sentence that names the file, and no surprise of Python's."""

from __future__ import annotations

import errno
import functools
import json
import os
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_models
from typer.testing import CliRunner

from longrope import RescaleFactors, Tiers
from longrope.cli.main import app
from longrope.errors import JournalError
from longrope.factor_search.options import SearchOptions
from longrope.factors import files
from longrope.runs import journal
from longrope.runs.journal import Journal

FACTORS = tiny_models.factors()
BIG = "9" * 400
DEEP = "[" * 100_000


def journal_text(tmp_path):
    path = tmp_path / "whole.jsonl"
    with Journal(path, {"seed": 0}, kind="search") as kept:
        kept.append([{"nll": 1.5}, {"nll": 2.5}])
    return path.read_text()


@functools.cache
def texts():
    """Return the content of a good file of each format, with what reads it and a name for it."""
    with tempfile.TemporaryDirectory() as folder:
        return _texts(Path(folder))


def _texts(tmp_path):
    FACTORS.save(tmp_path / "factors.json")
    FACTORS.ladder().save(tmp_path / "tiers.json")
    options = {"options": {"seed": 1, "steps": 20, "learning_rate": 0.05}}
    return {
        "factors": ((tmp_path / "factors.json").read_text(), RescaleFactors.load, "x.json"),
        "tiers": ((tmp_path / "tiers.json").read_text(), Tiers.load, "x.json"),
        "csv": ("".join(f"{v}\n" for v in FACTORS.lambdas), _csv, "x.csv"),
        "config": (json.dumps(options), SearchOptions.read, "config.json"),
        "toml": ("seed = 1\nsteps = 20\nlearning_rate = 0.05\n", SearchOptions.read, "x.toml"),
        "journal": (journal_text(tmp_path), journal.read, "x.jsonl"),
        "model": ('{"model_type": "llama", "hidden_size": 64}', _model, "config.json"),
    }


def _csv(path):
    return RescaleFactors.load(path, attention_factor=1.0)


def _model(path):
    from longrope.cli.folders import check_config

    return check_config("MODEL", path.parent)


FORMATS = ("factors", "tiers", "csv", "config", "toml", "journal", "model")


def read(tmp_path, kind, content):
    """Read a file of this content; returns the sentence of a refusal, None where it is taken."""
    _, load, name = texts()[kind]
    path = tmp_path / name
    path.write_bytes(content)
    try:
        load(path)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400 + len(str(path))
        assert str(path) in str(error)
        return str(error)
    return None


@pytest.mark.parametrize("kind", FORMATS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)  # fmt: skip
@given(data=st.data())
def test_corrupted_copies_are_taken_or_refused_in_one_sentence(tmp_path, kind, data):
    good = texts()[kind][0].encode()
    begin = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(begin, min(len(good), begin + 30)))
    put = data.draw(
        st.sampled_from([b"", b"\0", b"\xff", b'"', b"{}", b"null", b"1e999", b"-1", b"NaN", b"1,5",
                         b"[", BIG.encode(), DEEP.encode(), b'"a": 1, "a": 2,'])
        | st.binary(max_size=6)
        | st.text(string.printable, max_size=6).map(str.encode)
    )  # fmt: skip
    read(tmp_path, kind, good[:begin] + put + good[end:])


@pytest.mark.parametrize("kind", ["config", "toml", "factors", "tiers", "model"])
def test_values_that_are_nested_too_deeply(tmp_path, kind):
    start = "a = " if kind == "toml" else '{"options": '
    assert "nested too deeply" in read(tmp_path, kind, (start + DEEP + "\n").encode())


@pytest.mark.parametrize("kind", ["config", "toml"])
@pytest.mark.parametrize("name", ["seed", "steps"])
def test_numbers_of_400_digits(tmp_path, kind, name):
    text = f"{name} = {BIG}\n" if kind == "toml" else f'{{"options": {{"{name}": {BIG}}}}}'
    said = read(tmp_path, kind, text.encode())
    assert "a number of" in said and "digits" in said


def test_lengths_that_no_tensor_holds(tmp_path):
    text = texts()["factors"][0].replace('"target_length": 128', f'"target_length": {2**63}')
    assert "target_length: expected an integer of at most" in read(
        tmp_path, "factors", text.encode()
    )
    assert FACTORS.replace(target_length=2**63 - 1).target_length == 2**63 - 1


@pytest.mark.parametrize("kind", ["config", "factors", "model"])
def test_a_key_that_stands_there_twice(tmp_path, kind):
    good = texts()[kind][0]
    key = {"config": '"seed": 1', "factors": '"start_tokens": 0', "model": '"hidden_size": 64'}[
        kind
    ]
    assert "twice" in read(tmp_path, kind, good.replace(key, f"{key}, {key}").encode())


def test_decimal_commas(tmp_path):
    assert "a decimal point on line 1" in read(tmp_path, "csv", b"1,5\n2,5\n")


def test_tiers_of_a_csv_file_take_settings(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(texts()["csv"][0])
    beside = {"original_length": 32, "target_length": 128, "attention_factor": "su"}
    assert Tiers.load(path, **beside) == Tiers([RescaleFactors.load(path, **beside)])
    with pytest.raises(ValueError, match=r"original_length: expected no settings beside .*x\.json"):
        FACTORS.save(tmp_path / "x.json")
        Tiers.load(tmp_path / "x.json", original_length=32)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_with_its_file_and_leaves_nothing(tmp_path, monkeypatch):
    FACTORS.save(tmp_path / "factors.json")
    before = (tmp_path / "factors.json").read_text()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*factors\.json: No space left on device"):
        FACTORS.replace(start_tokens=4).save(tmp_path / "factors.json")
    assert [p.name for p in tmp_path.iterdir()] == ["factors.json"]
    assert (tmp_path / "factors.json").read_text() == before
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*x\.csv'"),
        files.replacing(tmp_path / "x.csv") as file,
    ):
        file.write(b"1\n")
    assert [p.name for p in tmp_path.iterdir()] == ["factors.json"]


def test_a_journal_on_a_full_disk_goes_on_later(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"seed": 0}, kind="search") as kept:
        kept.append([{"nll": 1.0}])
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"out: cannot write .*journal\.jsonl \(No space left"):
            kept.append([{"nll": 2.0}])
    monkeypatch.undo()
    with Journal(path, {"seed": 0}, kind="search") as kept:
        assert kept.pending[0] == {"nll": 1.0}


def test_the_instruction_set_is_called_what_the_environment_calls_it():
    code = "from longrope.cli.main import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, "info"], env=os.environ | {"LONGROPE_ISA": "mmx"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("longrope: LONGROPE_ISA: expected one of ")
    assert len(run.stderr.splitlines()) == 1


def test_the_command_line_starts_without_torch():
    code = "import sys, longrope.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def custom_code(folder, model_type="minicpm"):
    """Write the folder of a model with code of its own, which leaves a mark when it runs."""
    ran = folder / "RAN"
    named = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    content = {"model_type": model_type, "auto_map": named, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps(content))
    for name in ("configuration_own.py", "modeling_own.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w').write('x')\nclass Own: pass\n")
    return ran


@pytest.mark.parametrize("command", ["info", "perplexity"])
def test_code_of_a_models_folder_does_not_run_and_nobody_is_asked(tmp_path, command):
    ran = custom_code(tmp_path)
    (tmp_path / "a.txt").write_text("text " * 50)
    more = [str(tmp_path / "a.txt"), "--length", "64"] if command == "perplexity" else []
    result = CliRunner().invoke(app, [command, str(tmp_path), *more], input="y\ny\n")
    assert result.exit_code == 2 and not ran.exists()
    assert "whose model_type 'minicpm' needs code of the folder's own" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and "[y/N]" not in result.output


def test_a_typo_in_a_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def no_look_up(*_, **__):
        raise AssertionError("looked up")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_look_up)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("models/lama", "./lama", "/nowhere/lama", "~/no/lama", "a/b/c", "lama", "x.gguf"):
        result = CliRunner().invoke(app, ["perplexity", name, "a.txt", "--length", "64"])
        assert result.exit_code == 2, name
        assert "MODEL: expected a folder with a Hugging Face model, got" in result.stderr


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    import huggingface_hub

    asked = []

    def unreachable(self, name, timeout):
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    result = CliRunner().invoke(app, ["perplexity", "nobody/lama", "a.txt", "--length", "64"])
    assert result.exit_code == 2 and asked == ["nobody/lama"]
    assert "no folder here and not found on the hub (Name or service not known)" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_journal_errors_are_journal_errors(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(journal_text(tmp_path).replace("1.5", "1.25"))
    with pytest.raises(JournalError, match=r"line 2 of .* is damaged"):
        journal.read(path)
