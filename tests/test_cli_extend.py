"""The commands extend and recover: options from a file or a run, a second model, numbers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support import tiny_models
from support.commands import call
from support.threads import threads

import longrope

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = """
[[stages]]
kind = "search"
length = 32
steps = 2
samples = 1
[[stages]]
kind = "finetune"
length = 32
steps = 6
batch_size = 2
[[stages]]
kind = "recover"
lengths = [16]
steps = 1
samples = 1
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of a byte-level model, and a folder of texts."""
    place = tmp_path_factory.mktemp("files")
    model = tiny_models.build(vocab_size=256, pad_token_id=None, max_position_embeddings=16)
    model.save_pretrained(place / "model")
    (place / "texts").mkdir()
    for number in range(3):
        letters = torch.randint(97, 123, (150,), generator=torch.Generator().manual_seed(number))
        (place / "texts" / f"{number}.txt").write_bytes(bytes(letters.tolist()))
    return place


@pytest.fixture(scope="module")
def extended(files):
    """The same with a plan, and `run` that followed it."""
    (files / "plan.toml").write_text(PLAN)
    with threads(1):  # as in the tests that repeat the run
        extend(files, files / "run", "--target-length", 32, "--stages", files / "plan.toml",
               "--seed", 3)  # fmt: skip
    return files


def extend(place, out, *flags, code=0):
    where = ("--out", out, "--device", "cpu")
    return call("extend", place / "model", place / "texts", *where, *flags, code=code)


def asked(out):
    return json.loads((out / "config.json").read_text())["options"]


def test_the_config_of_an_extension_repeats_it_with_its_stages(extended, tmp_path):
    config = ("--options", extended / "run" / "config.json")
    extend(extended, tmp_path / "again", *config)
    assert asked(tmp_path / "again") == asked(extended / "run")
    for name in ("tiers.json", "model/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (extended / "run" / name).read_bytes()
    # Its own folder goes on, which an other plan could not.
    extend(extended, extended / "run", *config, "--target-length", 32)


def test_flags_win_over_the_stages_of_a_run(extended, tmp_path):
    config = extended / "run" / "config.json"
    flags = ("--steps", 9, "--learning-rate", 1e-3, "--dry-run")
    shown = extend(extended, tmp_path / "no", "--options", config, *flags).stdout
    assert "9 steps of 2 rows of 32 tokens, lr 0.001 linear" in shown
    shown = extend(extended, tmp_path / "no", "--options", config, *flags[2:]).stdout
    assert "6 steps of 2 rows of 32 tokens, lr 0.001 linear" in shown
    error = extend(
        extended, tmp_path / "no", "--options", config, "--target-length", 64, code=2
    ).stderr
    assert error.startswith(f"longrope: {config}: stages: expected the last search to reach")
    stages = ("--stages", "longrope-llama2", "--target-length", 512, "--dry-run")
    error = extend(extended, tmp_path / "no", "--options", config, *stages, code=2).stderr
    assert "documents: " in error or "DATA: " in error  # the recipe, for which texts are too short
    assert not (tmp_path / "no").exists()


def test_another_seed_is_that_of_all_stages(extended, tmp_path):
    config = extended / "run" / "config.json"
    extend(extended, tmp_path / "other", "--options", config, "--seed", 4, "--steps", 1)
    changed = asked(tmp_path / "other")
    assert changed["seed"] == 4
    stages = changed["stages"]
    assert [stages[name]["options"]["seed"] for name in ("search-1", "recover-3")] == [4, 4]
    assert stages["finetune-2"]["config"]["seed"] == 4
    assert stages["finetune-2"]["config"]["warmup_steps"] == 0  # of one step, not of six


def test_a_file_of_options_holds_stages_too(extended, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text(f"target_length = 32\nsteps = 7\n{PLAN.replace('steps = 6', '')}")
    shown = extend(extended, tmp_path / "no", "--options", file, "--dry-run").stdout
    assert "7 steps of 2 rows of 32 tokens" in shown
    file.write_text(f"target_length = 32\nsteps = 7\n{PLAN}")
    shown = extend(extended, tmp_path / "no", "--options", file, "--steps", 8, "--dry-run").stdout
    assert "8 steps of 2 rows of 32 tokens" in shown
    error = extend(extended, tmp_path / "no", "--options", file, "--dry-run", code=2).stderr
    assert error.startswith(f"longrope: {file}: steps: expected it in finetune or in stages[1]")


def test_stages_of_searches_alone_take_no_option_of_fine_tuning(extended, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('target_length = 32\n[[stages]]\nkind = "search"\nlength = 32\n')
    options = ("--options", file, "--dry-run")
    error = extend(extended, tmp_path / "no", *options, "--steps", 8, code=2).stderr
    assert error.startswith("longrope: --steps: expected --finetune or --stages")
    error = extend(extended, tmp_path / "no", *options, "--finetune", code=2).stderr
    assert error.startswith("longrope: --finetune: expected stages of fine-tuning")


def test_what_no_run_of_the_command_wrote_is_named(extended, tmp_path):
    recorded = json.loads((extended / "run" / "config.json").read_text())
    file = tmp_path / "config.json"
    model = extended / "run" / "model"
    recover = ("recover", model, extended / "texts", "--out", tmp_path / "no", "--device", "cpu")
    for command in (("extend", *recover[1:]), recover):
        file.write_text(json.dumps({"options": {"method": "gradient", "target_length": 32}}))
        error = call(*command, "--options", file, code=2).stderr
        expected = f"expected the config.json of a run of longrope {command[0]}, got another"
        assert error == f"longrope: {file}: {expected}\n"
    for broken in ({}, {"number": 1, "kind": "finetune"}, 3):
        recorded["options"]["stages"]["finetune-2"] = broken
        file.write_text(json.dumps(recorded))
        error = extend(extended, tmp_path / "no", "--options", file, code=2).stderr
        assert error.startswith(f"longrope: {file}: stages: expected those of a run")
    error = extend(extended, tmp_path / "no", code=2).stderr
    assert error.startswith("longrope: --target-length: expected a value, here or in --options")


def test_the_config_of_a_recovery_repeats_it(extended, tmp_path):
    command = ("recover", extended / "run" / "model", extended / "texts", "--device", "cpu")
    flags = ("--lengths", "8,16", "--steps", 1, "--samples", 1, "--seed", 5)
    call(*command, *flags, "--out", tmp_path / "run")
    config = ("--options", tmp_path / "run" / "config.json")
    call(*command, *config, "--out", tmp_path / "again")
    assert asked(tmp_path / "again") == asked(tmp_path / "run")
    tiers = [longrope.Tiers.load(tmp_path / name / "tiers.json") for name in ("run", "again")]
    assert tiers[0] == tiers[1]
    call(*command, *config, "--out", tmp_path / "run")  # goes on there, which has ended
    call(*command, *config, "--lengths", 16, "--seed", 6, "--out", tmp_path / "other")
    other = asked(tmp_path / "other")
    assert (other["lengths"], other["seed"], other["samples"]) == ([16], 6, 1)


@pytest.mark.parametrize(
    "lengths, message",
    [
        ("[]", "expected a list of lengths, got []"),
        ("16", "expected a list of lengths, got 16"),
        ('["8;16"]', "expected numbers like 512,1024, got '8;16'"),
        ("[2]", "expected an integer of at least 4, got 2"),
    ],
)
def test_lengths_that_are_refused(extended, tmp_path, lengths, message):
    file = tmp_path / "options.toml"
    file.write_text(f"lengths = {lengths}\n")
    command = ("recover", extended / "run" / "model", extended / "texts", "--out", tmp_path / "no")
    error = call(*command, "--options", file, code=2).stderr
    assert error == f"longrope: {file}: lengths: {message}\n"


def test_the_second_model_is_named(extended, tmp_path):
    command = ("recover", extended / "run" / "model", tmp_path / "no-texts", "--lengths", 16)
    command = (*command, "--out", tmp_path / "no", "--device", "cpu", "--original")
    none = tmp_path / "no-model"
    error = call(*command, none, code=2).stderr
    assert error.startswith("longrope: --original: expected a folder with a Hugging Face model")
    none.mkdir()
    error = call(*command, none, code=2).stderr
    assert error == f"longrope: --original: the folder '{none}' has no config.json\n"
    shutil.copy(extended / "model" / "config.json", none)
    error = call(*command, none, code=2).stderr
    assert error.startswith("longrope: --original: cannot load")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--short-length", 8), "--short-length: expected short_share above 0 beside it, got 8"),
        (
            ("--short-share", 0.5, "--short-length", 33),
            "--short-length: expected at most the 32 tokens of a row of finetune-2, got 33",
        ),
        (("--learning-rate", 1e39), "--learning-rate: expected a number of at most 1, got 1e+39"),
    ],
)
def test_options_of_fine_tuning_that_are_refused(extended, tmp_path, flags, message):
    training = ("--target-length", 32, "--finetune", *flags, "--dry-run")
    error = extend(extended, tmp_path / "no", *training, code=2).stderr
    assert error.startswith(f"longrope: {message}")


def test_a_dry_run_prints_the_plan_and_writes_nothing(files, tmp_path):
    out = tmp_path / "run"
    shown = call(
        "extend", files / "model", files / "texts", "--out", out, "--target-length", 64,
        "--finetune", "--steps", 30, "--dry-run", "--device", "cpu",
    ).stdout  # fmt: skip
    for words in (
        "search-64 (search)", "30 steps of 32 rows of 64 tokens", "tiers for 16, 32", "the table",
    ):  # fmt: skip
        assert words in shown
    assert "MiB" in shown
    assert not out.exists()


def test_options_of_fine_tuning_without_any_are_refused(tmp_path):
    error = call(
        "extend", tmp_path / "model", tmp_path, "--out", tmp_path / "run", "--target-length", 64,
        "--steps", 30, code=2,
    ).stderr  # fmt: skip
    assert error.startswith("longrope: --steps: expected --finetune or --stages")


def test_flags_win_over_a_recipe(files, tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"the quick brown fox {number} " * 30)
    shown = call(
        "extend", files / "model", tmp_path, "--out", tmp_path / "run", "--target-length", 512,
        "--stages", "longrope-llama2", "--steps", 9, "--learning-rate", 1e-3, "--dry-run",
        "--device", "cpu",
    ).stdout  # fmt: skip
    for length in (32, 64):
        trained = f"9 steps of 32 rows of {length} tokens, lr 0.001 linear, tiers by one"
        assert trained in shown


def test_the_commands_extend_and_recover(files, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(
        '[[stages]]\nkind = "search"\nlength = 32\nsteps = 2\nsamples = 1\n'
        '[[stages]]\nkind = "finetune"\nlength = 32\nsteps = 2\nwarmup_steps = 0\n'
    )
    out = tmp_path / "run"
    shown = call(
        "extend", files / "model", files / "texts", "--out", out, "--target-length", 32,
        "--stages", plan, "--batch-size", 2, "--seed", 3, "--device", "cpu",
    ).stdout  # fmt: skip
    assert "| finetune-2: 2 steps of 32 tokens |" in shown
    said = json.loads((out / "config.json").read_text())["options"]
    assert (said["seed"], said["stages"]["finetune-2"]["config"]["batch_size"]) == (3, 2)
    shown = call("info", out).stdout
    for words in ("16 to 32 tokens", "2 finetune-2", "perplexity", "finished"):
        assert words in shown
    shown = call(
        "recover", out / "model", files / "texts", "--lengths", 16, "--out", tmp_path / "short",
        "--steps", 2, "--samples", 1, "--original", files / "model", "--device", "cpu",
    ).stdout  # fmt: skip
    assert "| recovered, by position |" in shown
    assert longrope.Tiers.load(tmp_path / "short" / "tiers.json").limits == (16, 32)
    error = call(
        "extend", files / "model", files / "texts", "--out", out, "--target-length", 64,
        "--device", "cpu", code=2,
    ).stderr  # fmt: skip
    assert error.startswith("longrope: --out: ") and error.count("\n") == 1
