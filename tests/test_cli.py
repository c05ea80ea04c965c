"""The `longrope` command: its results, and one sentence and exit code 2 for bad input."""

from __future__ import annotations

import csv
import inspect
import json
import re
import shutil

import numpy as np
import pytest
import torch
from support import tiny_models
from support.commands import call, write_letters
from typer.testing import CliRunner

import longrope
from longrope.cli import inputs
from longrope.cli import search as search_command
from longrope.cli.main import app
from longrope.errors import TerminatedError
from longrope.evaluation import memory
from longrope.factor_search.gradient import GradientEvaluator


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_models.build(vocab_size=256, pad_token_id=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_letters(tmp_path_factory.mktemp("text") / "book.txt")


def sentence(*arguments):
    """Run a command that must fail and return what it says: one line, no traceback."""
    error = call(*arguments, code=2).stderr.strip()
    assert error.startswith("longrope: ") and "\n" not in error and "Traceback" not in error
    return error


def test_help_lists_the_commands():
    shown = call("--help").stdout
    assert all(name in shown for name in ("demo", "search", "perplexity", "export", "info"))


def test_info_shows_the_build_a_model_and_factors(model_folder, tmp_path):
    assert longrope.__version__ in call("info").stdout
    assert "llama" in call("info", model_folder).stdout
    tiny_models.factors("yarn").save(tmp_path / "factors.json")
    assert str(tiny_models.TARGET) in call("info", tmp_path / "factors.json").stdout


def test_perplexity_equals_the_library_with_and_without_factors(model_folder, text, tmp_path):
    model, _ = inputs.load_model(str(model_folder), "cpu")
    documents = longrope.load_data(text)
    options = ("--length", 128, "--stride", 64, "--device", "cpu")
    expected = longrope.perplexity(model, documents, length=128, stride=64)
    assert call("perplexity", model_folder, text, *options).stdout.strip() == f"{expected:.4f}"
    factors = tiny_models.factors("yarn")
    factors.save(tmp_path / "factors.json")
    longrope.apply(model, factors)
    expected = longrope.perplexity(model, documents, length=128, stride=64)
    shown = call("perplexity", model_folder, text, *options, "--factors", tmp_path / "factors.json")
    assert shown.stdout.strip() == f"{expected:.4f}"


@pytest.mark.parametrize(
    "options",
    [
        {"method": "evolution", "iterations": 2, "population": 8, "max_evaluations": 12,
         "max_lambda": 3.0, "original_length": 24, "batch_size": 3, "mutations": 3,
         "crossovers": 2, "mutation_probability": 0.5, "parents": 4},
        {"method": "evolution", "iterations": 1, "race": True, "critical_dimension": True},
        {"method": "gradient", "steps": 2, "learning_rate": 0.1, "attention_factor": "search",
         "windows_per_step": 2, "activation_checkpointing": True},
    ],
)  # fmt: skip
def test_search_writes_factors_that_the_library_finds_too(
    model_folder, text, tmp_path, options, monkeypatch
):
    monkeypatch.setattr(memory, "LEAST_CHUNK", 16)
    options = {"target_length": 64, "samples": 1, "seed": 3, **options}
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}"] + [value] * (value is not True)
    call("search", model_folder, text, "--out", tmp_path / "run", "--device", "cpu", *flags)
    header = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[0])
    if options.get("activation_checkpointing"):
        assert header["notes"]["gradient"] == [False, 16]
    assert bool(header["race"]) is bool(header["critical_dimension"]) is ("race" in options)
    model, _ = inputs.load_model(str(model_folder), "cpu")
    expected = longrope.search(model, longrope.load_data(text), progress=False, **options)
    assert longrope.RescaleFactors.load(tmp_path / "run" / "factors.json") == expected.factors


def test_search_says_what_yarn_reaches_and_info_what_a_run_is(model_folder, text, tmp_path):
    run = tmp_path / "run"
    options = ("--target-length", 64, "--samples", 2, "--steps", 3, "--device", "cpu")
    said = call("search", model_folder, text, "--out", run, *options).stdout
    lines = re.findall(r"perplexity (\S+) on the (\S+) windows, (\S+) with YaRN", said)
    assert [line[1] for line in lines] == ["search", "held-out"]
    with (run / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for (_, _, yarn), role in zip(lines, ("search", "validation"), strict=True):
        measured = {r["role"]: r["perplexity"] for r in rows if r["origin"] == "yarn"}
        assert float(yarn) == pytest.approx(float(measured[role]), abs=1e-4)
    shown = call("info", run).stdout
    assert "gradient" in shown and "3 steps" in shown and " finished" in shown
    (run / "factors.json").unlink()
    assert "not finished" in call("info", run).stdout


def test_search_of_a_ladder_writes_tiers_that_perplexity_takes(model_folder, text, tmp_path):
    run = tmp_path / "run"
    options = ("--target-length", 128, "--samples", 1, "--steps", 2, "--device", "cpu")
    said = call("search", model_folder, text, "--ladder", "--out", run, *options).stdout
    tiers = longrope.Tiers.load(run / "tiers.json")
    assert tiers.limits == (32, 64, 128)
    assert tiers[-1] == longrope.RescaleFactors.load(run / "factors.json")
    assert str(tiers) in said and "tiers.json" in said
    shown = call("info", run).stdout
    assert "64, 128 tokens" in shown and "tier 2" in shown
    options = ("--length", 128, "--factors", run / "tiers.json", "--device", "cpu")
    assert float(call("perplexity", model_folder, text, *options).stdout) > 1
    options = ("--target-length", 128, "--samples", 1, "--steps", 2, "--device", "cpu")
    refused = call("search", model_folder, text, "--out", run, *options, code=2)
    assert "another search (ladder: " in refused.stderr


def test_short_documents_are_left_out_and_counted(model_folder, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, size in (("a", 500), ("b", 63), ("c", 64)):
        (texts / f"{name}.txt").write_text("x" * size)
    options = ("--samples", 1, "--steps", 1, "--out", tmp_path / "run", "--device", "cpu")
    done = call("search", model_folder, texts, "--target-length", 64, *options)
    assert f"1 of 3 documents in {texts} are shorter than 64 tokens and left out" in done.stderr
    options = ("--target-length", 501, *options)
    assert "DATA: " in sentence("search", model_folder, texts, *options)
    other = ("--validation", tmp_path / "none")
    assert "--validation: there is no" in sentence("search", model_folder, texts, *options, *other)


def test_a_run_may_lie_among_its_documents_and_not_be_their_folder(model_folder, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abc":
        (texts / f"{name}.txt").write_text(f"the quick brown {name} " * 8)
    options = ("--target-length", 64, "--samples", 1, "--steps", 1, "--device", "cpu")
    for _ in range(2):  # the second finds the first's files
        done = call("search", model_folder, texts, "--out", texts / "run", *options)
    assert "left out 1 run folder (run)" in done.stderr
    assert "--out: expected a folder of its own, got" in sentence(
        "search", model_folder, texts, "--out", texts, *options
    )


def test_the_folder_of_a_model_is_no_run_directory(model_folder, text):
    before = (model_folder / "config.json").read_bytes()
    options = ("--target-length", 64, "--out", model_folder, "--device", "cpu")
    assert "which holds config.json" in sentence("search", model_folder, text, *options)
    assert (model_folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TerminatedError])
def test_an_interrupted_command_says_whether_it_resumes(
    model_folder, text, tmp_path, monkeypatch, kind
):
    options = ("--target-length", 64, "--samples", 1, "--steps", 5, "--device", "cpu")
    arguments = [str(a) for a in ("search", model_folder, text, "--out", tmp_path / "a", *options)]

    def interrupt(*_):
        raise kind

    with monkeypatch.context() as patched:
        patched.setattr(GradientEvaluator, "__call__", interrupt)
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 130
    said = "interrupted" if kind is KeyboardInterrupt else "ended by torchrun"
    assert f"longrope: {said}" in done.stderr
    assert done.stderr.strip().endswith("; the same command resumes")
    with monkeypatch.context() as patched:
        patched.setattr(search_command, "load_model", interrupt)
        arguments[4] = str(tmp_path / "b")
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 130
    assert "resumes" not in done.stderr


@pytest.mark.parametrize(
    "error, said",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            " (tried to allocate 2.00 GiB)",
        ),
        (
            RuntimeError("CPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            " (tried to allocate 8 bytes)",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), ""),
        (MemoryError(), ""),
    ],
)
def test_memory_that_runs_out_is_one_sentence(
    model_folder, text, tmp_path, monkeypatch, error, said
):
    def fail(*_):
        raise error

    options = ("--target-length", 64, "--samples", 1, "--steps", 5, "--device", "cpu")
    arguments = [str(a) for a in ("search", model_folder, text, "--out", tmp_path, *options)]
    with monkeypatch.context() as patched:
        patched.setattr(GradientEvaluator, "__call__", fail)
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    end = f"longrope: out of memory{said}, which other processes may hold; the same command resumes"
    assert done.stderr.strip().splitlines()[-1] == end
    assert CliRunner().invoke(app, arguments).exit_code == 0


def test_search_has_the_options_of_the_library():
    there = set(inspect.signature(longrope.search).parameters) - {"documents", "progress"}
    here = set(inspect.signature(search_command.search).parameters)
    reading = {"text_field", "token_cache", "token_dtype", "dtype"}  # the documents and the model
    assert here - {"data", "device", "options", "context"} - reading == there


def test_a_file_of_options_is_the_same_as_flags_which_win(model_folder, text, tmp_path):
    def run(name, *flags):
        call("search", model_folder, text, "--out", tmp_path / name, "--device", "cpu", *flags)
        config = json.loads((tmp_path / name / "config.json").read_text())
        return config["options"], longrope.RescaleFactors.load(tmp_path / name / "factors.json")

    file = tmp_path / "options.toml"
    file.write_text(
        "target_length = 64\nsamples = 1\nsteps = 2\nseed = 9\nstart_tokens = 4\n"
        'attention_factor = "su"\nactivation_checkpointing = true\n'
    )
    flags = ("--target-length", 64, "--samples", 1, "--steps", 2, "--start-tokens", 4,
             "--attention-factor", "su", "--activation-checkpointing")  # fmt: skip
    by_flags = run("flags", *flags, "--seed", 3)
    assert run("file", "--options", file, "--seed", 3) == by_flags
    assert by_flags[0]["seed"] == 3 and by_flags[0]["start_tokens"] == 4
    # The config of a run repeats it.
    assert run("again", "--options", tmp_path / "file" / "config.json") == by_flags


def test_a_wrong_file_of_options_is_named_with_its_key(model_folder, text, tmp_path):
    file = tmp_path / "options.toml"
    search = ("search", model_folder, text, "--out", tmp_path / "run", "--device", "cpu")

    def said(content, *flags):
        file.write_text(content)
        return sentence(*search, "--options", file, *flags).removeprefix(f"longrope: {file}: ")

    assert said("target_length = 64\nsede = 1") == (
        "sede: there is no such option (did you mean seed?)"
    )
    assert said('samples = "many"').startswith("samples: expected an integer of at least 1, got")
    assert said("samples = 1") == (
        "longrope: --target-length: expected a value, here or in --options, got none"
    )
    # Wrong together with something else: the model, another option.
    assert said("target_length = 16").startswith("target_length: expected more than the original")
    clash = "steps: expected None with method='evolution', got 3"
    assert said("target_length = 64\nsteps = 3", "--method", "evolution") == clash
    flags = ("--method", "evolution", "--steps", 3)
    assert said("target_length = 64\nsteps = 5", *flags) == f"longrope: --{clash}"
    assert said("target_length = 64", "--samples", 0).startswith("longrope: --samples: expected")
    missing = sentence(*search, "--options", tmp_path / "none.toml")
    assert missing.startswith(f"longrope: --options: cannot read {tmp_path / 'none.toml'} (")
    file.write_bytes(b"\xff\xfe")
    assert "expected TOML, got a file broken" in sentence(*search, "--options", file)


def test_the_version_is_shown():
    assert call("--version").stdout == f"longrope {longrope.__version__}\n"


def test_errors_name_the_arguments_of_the_command(model_folder, text, tmp_path):
    none = tmp_path / "none"
    assert "DATA: there is no file" in sentence("perplexity", model_folder, none, "--length", 64)
    assert "DATA: " in sentence("perplexity", model_folder, text, "--length", 601)
    assert "longrope: --length: expected" in sentence(
        "perplexity", model_folder, text, "--length", 0
    )
    assert "longrope: --stride: expected" in sentence(
        "perplexity", model_folder, text, "--length", 64, "--stride", 65
    )
    search = ("search", model_folder, text, "--target-length", 64, "--device", "cpu")
    assert "longrope: --out: cannot write" in sentence(*search, "--out", text / "below")
    assert "longrope: --seed: expected" in sentence(*search, "--out", none, "--seed", -1)


def test_bad_input_gets_one_sentence(model_folder, text, tmp_path):
    search = ("--target-length", 64, "--out", tmp_path / "run", "--device", "cpu")
    length = ("--length", 64)
    assert "no_such_model" in sentence("perplexity", tmp_path / "no_such_model", text, *length)
    assert "config.json" in sentence("perplexity", tmp_path, text, *length)
    assert "no_such_text" in sentence(
        "perplexity", model_folder, tmp_path / "no_such_text", *length
    )
    assert "600" in sentence("perplexity", model_folder, text, "--length", 601)
    assert "start" in sentence("search", model_folder, text, *search, "--start-tokens", "many")
    assert "attention" in sentence("search", model_folder, text, *search, "--attention-factor", "x")
    assert "method" in sentence("search", model_folder, text, *search, "--method", "guess")
    short = ("--target-length", 16, "--out", tmp_path / "run", "--device", "cpu")
    assert "--target-length: " in sentence("search", model_folder, text, *short)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert str(blocked) in sentence("demo", "--out", blocked / "out")


def test_a_model_that_cannot_be_loaded_gets_one_sentence(model_folder, text, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    said = sentence("perplexity", folder, text, "--length", 128, "--device", "cpu")
    assert said.startswith(f"longrope: MODEL: cannot load '{folder}': ")
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "MODEL: cannot load" in sentence("perplexity", folder, text, "--length", 128)


def test_a_window_shorter_than_the_default_stride(model_folder, text):
    short = call("perplexity", model_folder, text, "--length", 64, "--device", "cpu")
    same = call("perplexity", model_folder, text, "--length", 64, "--stride", 64, "--device", "cpu")
    assert short.stdout == same.stdout


def test_a_device_that_is_not_there_gets_one_sentence(model_folder, text):
    options = ("perplexity", model_folder, text, "--length", 128, "--device")
    assert "CUDA device" in sentence(*options, "cuda:99")
    assert "expected cpu or cuda, got 'gpu'" in sentence(*options, "gpu")
    assert "expected cpu or cuda, got 'meta'" in sentence(*options, "meta")


def test_malformed_factors_get_one_sentence(model_folder, text, tmp_path):
    broken = tmp_path / "factors.json"
    broken.write_text('{"lambdas": [1, 2')
    assert "factors.json" in sentence(
        "perplexity", model_folder, text, "--length", 64, "--factors", broken
    )
    longrope.RescaleFactors.pi(original_length=32, target_length=64, rotary_dim=32).save(broken)
    assert "rotary_dim" in sentence(
        "perplexity", model_folder, text, "--length", 64, "--factors", broken
    )


def test_export_writes_a_folder_and_shows_what_readers_lose(model_folder, text, tmp_path):
    factors = tiny_models.factors("yarn", start_tokens=2)
    factors.ladder().save(tmp_path / "tiers.json")
    out, options = tmp_path / "out", ("--factors", tmp_path / "tiers.json", "--device", "cpu")
    said = sentence("export", model_folder, *options, "--out", out)
    assert said.startswith("longrope: --drop-start-tokens: expected True")
    done = call("export", model_folder, *options, "--out", out, "--data", text,
                "--drop-start-tokens", "--short", "none")  # fmt: skip
    assert done.stderr.count("beyond 32 tokens") == 1
    shown = done.stdout
    card = (out / "README.md").read_text()
    assert shown[shown.index("|") : shown.rindex("|") + 1] in card
    assert "book.txt" in card and "2 start tokens" in shown
    assert longrope.load(out)[0].config.vocab_size == 256
    again = sentence("export", model_folder, *options, "--out", out)
    assert again.startswith("longrope: --out: expected a new or an empty folder")
    short = tmp_path / "short.json"
    tiny_models.factors("yarn", target=64).save(short)
    flags = ("--drop-start-tokens", "--short", short, "--out", tmp_path / "second")
    call("export", model_folder, *options, *flags)
    rope = json.loads((tmp_path / "second" / "config.json").read_text())["rope_parameters"]
    assert rope["original_max_position_embeddings"] == 64
    assert "How the factors were found" in (tmp_path / "second" / "README.md").read_text()


def test_export_names_the_data_that_it_cannot_measure_on(tmp_path):
    tiny_models.build(vocab_size=256, pad_token_id=None).save_pretrained(tmp_path / "model")
    tiny_models.factors("yarn").save(tmp_path / "factors.json")
    np.save(tmp_path / "ids.npy", np.full(200, 300, np.uint16))
    error = sentence(
        "export", tmp_path / "model", "--factors", tmp_path / "factors.json",
        "--data", tmp_path / "ids.npy", "--out", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert error.startswith("longrope: --data[0]: ")


def test_export_says_how_a_search_found_its_factors(model_folder, text, tmp_path):
    run = ("--target-length", 64, "--samples", 1, "--steps", 1, "--out", tmp_path / "run")
    call("search", model_folder, text, *run, "--device", "cpu", "--start-tokens", 0)
    factors = ("--factors", tmp_path / "run" / "factors.json")
    call("export", model_folder, *factors, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| options: method | gradient |" in card and "| options: seed | 0 |" in card
    assert "stage one" not in card


def test_a_search_on_a_folder_of_tiers_goes_on_above_them(tmp_path, text):
    """The tiers of an export are stage one, and the card of the next export names them."""
    first = tiny_models.factors("yarn", target=64).replace(attention_factor=1.25).ladder()
    model = tiny_models.build(vocab_size=256, pad_token_id=None)
    longrope.export(model, tmp_path / "first", first)
    run = tmp_path / "run"
    options = ("--target-length", 128, "--samples", 1, "--steps", 1, "--start-tokens", 0)
    shown = call(
        "search", tmp_path / "first", text, *options, "--ladder", "--out", run, "--device", "cpu"
    )
    assert "tiers of its longrope.json are stage one" in shown.stderr
    found = longrope.Tiers.load(run / "tiers.json")
    assert found[: len(first)] == first
    assert found.limits == (*first.limits, 128)
    call("export", tmp_path / "first", "--factors", run / "tiers.json", "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| stage one | factors for 64 tokens (lambdas 1 to" in card
    assert "attention factor 1.25), and a stage of 2x on top |" in card
    # From the base: an old window, no tiers.
    call(
        "search", tmp_path / "first", text, *options, "--scaling", "ignore", "--out",
        tmp_path / "base", "--device", "cpu",
    )  # fmt: skip
    head = json.loads((tmp_path / "base" / "config.json").read_text())
    assert head["problem"].get("stage") is None
    (tmp_path / "first" / "longrope.json").write_text("{")
    error = sentence("search", tmp_path / "first", text, *options, "--out", tmp_path / "no")
    assert error.startswith("longrope: MODEL: cannot load ")


def test_tiers_from_the_command_line(model_folder, text, tmp_path):
    """A file of tiers goes where one of factors does, by position unless asked otherwise."""
    rope = longrope.rope_settings(inputs.load_model(str(model_folder), "cpu")[0])
    yarn = longrope.RescaleFactors.yarn(**rope.lengths(128))
    yarn.ladder().save(tmp_path / "tiers.json")
    yarn.save(tmp_path / "factors.json")
    measure = (
        "perplexity",
        model_folder,
        text,
        "--length",
        128,
        "--stride",
        128,
        "--device",
        "cpu",
    )

    def parts(name, *more):
        out = call(*measure, "--factors", tmp_path / name, "--ranges", "1-32,64-128", *more).stdout
        return [float(line.split()[-1]) for line in out.splitlines()[:3]]

    plain = call(*measure, "--ranges", "1-32").stdout.splitlines()[1]
    by_position, by_row = parts("tiers.json"), parts("tiers.json", "--tiers", "row")
    assert by_position[1] == float(plain.split()[-1])  # the first window is the model's own
    assert by_row == parts("factors.json")  # of the row's length
    assert by_position[1] != by_row[1]
    assert "--ranges: expected" in sentence(*measure, "--ranges", "a-b")
    assert "tiers: expected" in sentence(
        *measure, "--factors", tmp_path / "tiers.json", "--tiers", "column"
    )
    assert "64-" in call("info", tmp_path / "tiers.json").stdout


def test_info_says_which_paths_a_model_takes(model_folder, text):
    said = call("info", model_folder, "--runtime").stdout
    assert "Llama" in said and "ops.attention on cpu" in said
    assert "--runtime: expected" in sentence("info", text, "--runtime")
