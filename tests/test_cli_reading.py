"""The options of the commands that say how documents and factors are read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support import tiny_models
from support.commands import call

import longrope
from longrope.runs.journal import Journal


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    rope = {"rope_theta": 500000.0}
    tiny_models.build(vocab_size=256, pad_token_id=None, rope=rope).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(0)
    return [bytes(random.integers(97, 123, 300, dtype=np.uint8)).decode() for _ in range(3)]


def perplexity(model_folder, *arguments, code=0):
    options = ("--length", 64, "--stride", 32, "--device", "cpu")
    return call("perplexity", model_folder, *arguments, *options, code=code)


def test_several_paths_and_a_named_field(model_folder, texts, tmp_path):
    for name, text in zip("abc", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    lines = [json.dumps({"content": text}) for text in [*texts, None]]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    expected = perplexity(model_folder, *paths)
    found = perplexity(model_folder, tmp_path / "all.jsonl", "--text-field", "content")
    assert found.stdout == expected.stdout
    assert found.stderr == f"DATA: left out 1 null row ({tmp_path / 'all.jsonl'}:4)\n"
    assert expected.stderr == ""
    said = perplexity(model_folder, tmp_path / "all.jsonl", code=2).stderr
    assert said.startswith("longrope: ") and said.count("\n") == 1 and "'text'" in said


def test_token_files(model_folder, texts, tmp_path):
    (tmp_path / "a.txt").write_text(texts[0])
    np.frombuffer(texts[0].encode(), np.uint8).astype(np.uint16).tofile(tmp_path / "a.bin")
    found = perplexity(model_folder, tmp_path / "a.bin", "--token-dtype", "uint16")
    assert found.stdout == perplexity(model_folder, tmp_path / "a.txt").stdout
    said = perplexity(model_folder, tmp_path / "a.bin", code=2).stderr
    assert said.startswith("longrope: DATA: ") and "token_dtype" in said


def test_bos_is_asked_for(model_folder, texts, tmp_path):
    (tmp_path / "a.txt").write_text(texts[0])
    plain = perplexity(model_folder, tmp_path / "a.txt").stdout
    assert perplexity(model_folder, tmp_path / "a.txt", "--bos", "false").stdout == plain
    assert perplexity(model_folder, tmp_path / "a.txt", "--bos", 1).stdout != plain
    said = perplexity(model_folder, tmp_path / "a.txt", "--bos", "often", code=2).stderr
    assert "longrope: --bos: expected 'auto', True, False or a token id, got 'often'" in said
    run = ("search", model_folder, tmp_path / "a.txt", "--target-length", 64, "--device", "cpu",
           "--steps", 1, "--samples", 1, "--out", tmp_path / "run")  # fmt: skip
    call(*run, "--bos", 1)
    said = call(*run, "--bos", "false", code=2).stderr
    assert "bos: 1 there, null here" in said


def test_a_csv_takes_the_rest_from_the_model_and_says_so(model_folder, texts, tmp_path):
    (tmp_path / "a.txt").write_text(texts[0])
    made = longrope.RescaleFactors.yarn(
        original_length=32, target_length=64, rope_theta=500000.0, rotary_dim=16
    )
    np.savetxt(tmp_path / "f.csv", np.r_[4, made.lambdas])
    su = longrope.su_attention_factor(2, 32)
    made.replace(attention_factor=su, start_tokens=4).save(tmp_path / "f.json")
    found = perplexity(model_folder, tmp_path / "a.txt", "--factors", tmp_path / "f.csv")
    same = perplexity(model_folder, tmp_path / "a.txt", "--factors", tmp_path / "f.json")
    assert found.stdout == same.stdout and same.stderr == ""
    assert found.stderr == (
        f"{tmp_path / 'f.csv'} holds factors alone: with rope theta 500000, original length 32, "
        f"target length 64, attention factor {su:.6g} (su)\n"
    )
    factors = ("--factors", tmp_path / "f.csv", "--attention-factor")
    other = perplexity(model_folder, tmp_path / "a.txt", *factors, 1.5)
    assert other.stdout != found.stdout and "attention factor 1.5\n" in other.stderr
    said = perplexity(model_folder, tmp_path / "a.txt", *factors, "so", code=2).stderr
    assert "attention_factor: expected one of 'su', 'yarn'" in said
    json_file = ("--factors", tmp_path / "f.json", "--rope-theta", 1e4)
    said = perplexity(model_folder, tmp_path / "a.txt", *json_file, code=2).stderr
    assert "longrope: --rope-theta: expected none beside" in said
    assert "not stated" in call("info", tmp_path / "f.csv").stdout


def test_info_of_a_run_that_it_does_not_sum_up_is_one_sentence(tmp_path):
    with Journal(tmp_path / "journal.jsonl", {}, kind="recovery"):
        pass
    said = call("info", tmp_path, code=2).stderr
    assert said.startswith("longrope: WHAT: expected the folder of a model, or of a run of search")


def test_info_and_resume_find_an_altered_journal(model_folder, texts, tmp_path):
    (tmp_path / "a.txt").write_text(texts[0])
    run = ("search", model_folder, tmp_path / "a.txt", "--target-length", 64, "--device", "cpu",
           "--steps", 2, "--samples", 1, "--out", tmp_path / "run")  # fmt: skip
    call(*run)
    journal = tmp_path / "run" / "journal.jsonl"
    content = journal.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(12):
        broken = bytearray(content)
        place = int(random.integers(40, len(content) - 1))
        broken[place] = (broken[place] + 1) % 256
        journal.write_bytes(bytes(broken))
        for command in (("info", tmp_path / "run"), run):
            said = call(*command, code=2).stderr
            assert said.startswith("longrope: ") and said.count("\n") == 1
            assert "damaged" in said
