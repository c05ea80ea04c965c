"""`longrope.evaluate`: every task for every set, one table, resumed to the same bytes."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch
from support import tiny_models
from support.commands import call

import longrope
from longrope import RescaleFactors
from longrope.evaluation import suite
from longrope.evaluation.long_perplexity import long_perplexity
from longrope.evaluation.suite_report import Evaluation, Figure, looks, other_suites
from longrope.patching.apply import rotary_of
from longrope.runs.journal import read

pytestmark = pytest.mark.usefixtures("one_thread")
ASK = {"lengths": [300, 260], "tasks": ["passkey", "perplexity"], "trials": 2}


def build():
    return tiny_models.build(vocab_size=256, pad_token_id=None)


def documents(size=320):
    random = np.random.default_rng(0)
    return [random.integers(97, 123, size, dtype=np.uint8) for _ in range(2)]


def sets():
    yarn = tiny_models.factors("yarn", target=512)
    return {"yarn": yarn.ladder(), "cope": yarn.cope(3)}


def test_figures_are_those_of_the_measures(tmp_path, reports):
    model = build()
    found = longrope.evaluate(model, documents(), factors=sets(), out=tmp_path / "run", **ASK)
    assert found.sets == ("as loaded", "yarn", "cope") and found.tasks == ("passkey", "perplexity")
    assert len(found.figures) == 3 * 2 * 2
    for name, factors in {"as loaded": None, **sets()}.items():
        if factors is not None:
            longrope.apply(model, factors)
        expected = longrope.passkey(model, None, lengths=[260, 300], trials=2)
        assert found.passkey(name).trials == expected.trials
        figure = found.of("perplexity", name)[300]
        assert figure.value == longrope.perplexity(model, documents(), length=300, stride=300)
        longrope.remove(model)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {
        "config.json", "journal.jsonl", "times.jsonl", "evaluation.csv", "evaluation.png",
        "passkey.png", "report.html", "results.csv", "plots",
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "run" / "evaluation.csv").open()))
    assert [row["length"] for row in rows] == ["260"] * 6 + ["300"] * 6
    assert float(rows[3]["value"]) == found.figures[3].value


def test_factors_under_which_the_model_is_not_finite_have_no_figure(tmp_path, reports):
    broken = tiny_models.factors("yarn", target=512).replace(attention_factor=1e25)
    ask = {"lengths": [260, 300], "tasks": ["perplexity", "passkey", "longppl"], "trials": 2}
    model, factors = build(), {"broken": broken} | sets()
    found = longrope.evaluate(model, documents(), factors=factors, out=tmp_path, **ask)
    for figure in found.figures:
        assert (figure.value is None) == (figure.set == "broken" or figure.task == "longppl")
    assert "passkey" in str(found) and found.passkey("broken").trials == ()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="is nan"):
        longrope.evaluate(model, documents(), factors=factors, out=tmp_path / "nan", **ask)


class KilledError(Exception):
    pass


def test_a_killed_run_resumes_and_measures_nothing_twice(tmp_path, monkeypatch):
    whole = longrope.evaluate(build(), documents(), factors=sets(), out=tmp_path / "whole", **ASK)
    calls, measure = [], suite._measure

    def dying(*args):
        calls.append(args[3:5])
        if len(calls) == 6:
            raise KilledError
        return measure(*args)

    monkeypatch.setattr(suite, "_measure", dying)
    model = build()
    longrope.apply(model, sets()["yarn"])
    with pytest.raises(KilledError):
        longrope.evaluate(model, documents(), factors=sets(), out=tmp_path / "cut", **ASK)
    assert rotary_of(model).tiers == sets()["yarn"]  # back in force
    calls.clear()
    calls += [None] * 6
    again = longrope.evaluate(model, documents(), factors=sets(), out=tmp_path / "cut", **ASK)
    assert len(calls) - 6 == 12 - 5
    assert again == whole
    for name in ("journal.jsonl", "evaluation.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    calls.clear()
    done = longrope.evaluate(model, documents(), factors=sets(), out=tmp_path / "cut", **ASK)
    assert done == whole and not calls


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trials": 3}, "trials: 2 there, 3 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"factors": {}}, "sets: "),
        ({"factors": dict(reversed(sets().items()))}, "sets: "),
        ({"factors": sets() | {"cope": sets()["yarn"]}}, "factors.cope"),
        ({"documents": documents(330)}, "documents"),
        ({"model": tiny_models.build("qwen2", vocab_size=256, pad_token_id=None)}, "model: "),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    asked = {"factors": sets(), **ASK, "lengths": [260], "tasks": ["perplexity"]}
    longrope.evaluate(build(), documents(), out=tmp_path, **asked)
    asked |= change
    model, texts = asked.pop("model", build()), asked.pop("documents", documents())
    with pytest.raises(ValueError, match=r"is the journal of another evaluation") as refused:
        longrope.evaluate(model, texts, out=tmp_path, **asked)
    assert message in str(refused.value)
    longrope.evaluate(model, texts, out=tmp_path, resume=False, **asked)
    assert (tmp_path / "previous-1" / "journal.jsonl").is_file()


def test_key_tokens_are_those_of_the_first_set_for_all(tmp_path, monkeypatch):
    asked = []

    def measured(model, texts, *, keys, **kwargs):
        asked.append(keys)
        return long_perplexity(model, texts, keys=keys or [range(40, 60)] * 6, **kwargs)

    monkeypatch.setattr(suite, "long_perplexity", measured)
    ask = {"lengths": [32, 100], "tasks": ["longppl"], "factors": sets(), "out": tmp_path}
    found = longrope.evaluate(build(), documents(), **ask)
    assert asked[0] is None and asked[1] == asked[2] == [list(range(40, 60))] * 6
    assert [f.n for f in found.figures] == [None] * 3 + [120] * 3  # 32 is the original window
    assert [f.set for f in found.figures[3:]] == ["yarn", "cope", "as loaded"]
    monkeypatch.setattr(suite, "_measure", None)
    assert longrope.evaluate(build(), documents(), **ask) == found


def test_the_model_as_loaded_says_what_is_key_only_where_no_set_can(tmp_path, monkeypatch):
    places = [range(40, 60)] * 6

    def measured(model, texts, *, keys, **kwargs):
        tiers = getattr(model.model.rotary_emb, "tiers", None)
        if tiers == sets()["yarn"]:
            raise ValueError("documents: expected at least 10 key tokens, got 3")
        own = [range(50, 70)] * 6 if tiers is None else places
        return long_perplexity(model, texts, keys=keys or own, **kwargs)

    monkeypatch.setattr(suite, "long_perplexity", measured)
    ask = {"lengths": [100], "tasks": ["longppl"], "factors": sets(), "out": tmp_path}
    found = longrope.evaluate(build(), documents(), **ask)
    assert found.of("longppl", "yarn")[100].value is None
    for name in ("cope", "as loaded"):
        assert found.of("longppl", name)[100].detail == [list(each) for each in places]


def test_the_table_the_curves_and_the_commands():
    figures = [
        Figure("a", "perplexity", 64, 3.25, None, None, 9, None),
        Figure("as loaded", "perplexity", 64, 4.0, None, None, 9, None),
        Figure("a", "longppl", 64, None, None, None, None, None),
        Figure("as loaded", "longppl", 64, 2.0, 1.5, 2.5, 12, None),
    ]
    assert str(Evaluation(tuple(figures))).split("\n") == [
        "perplexity  64", "as loaded   4.0000", "a           3.2500", "",
        "LongPPL    64", "as loaded  2.0000 (1.5000 to 2.5000)", "a          -",
    ]  # fmt: skip
    drawn = looks(["as loaded", "yarn", "mine", "yours"])
    assert len({(look["color"], look["marker"]) for look in drawn}) == 4
    assert [look["label"] for look in drawn] == ["as loaded", "yarn", "mine", "yours"]
    said = other_suites("my folder", [2048, 8192])
    assert "pretrained='my folder',max_length=8192" in said and '"max_seq_lengths": [8192]' in said


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tasks": ["reading"]}, "tasks: expected one of 'perplexity'"),
        ({"tasks": "passkey"}, "tasks: expected names of perplexity"),
        ({"lengths": [400]}, "lengths: expected at most 320, the tokens of the longest document"),
        ({"lengths": []}, "lengths: expected one or more numbers"),
        ({"factors": {"as loaded": tiny_models.factors()}}, "factors: expected names other than"),
        ({"tiers": "rows"}, "tiers: expected one of 'position', 'row', got 'rows'"),
        ({"model": 3}, "model: expected a causal language model with generate"),
        ({"lengths": [100]}, "lengths: expected at least 253 tokens, which the prompt has"),
    ],
)
def test_refusals_are_one_sentence(tmp_path, change, message):
    asked = {"model": build(), **ASK} | change
    with pytest.raises(ValueError) as refused:
        longrope.evaluate(asked.pop("model"), documents(), out=tmp_path / "run", **asked)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tasks": ["perplexity", "passkey"], "lengths": [100, 300]}, "lengths: expected at least"),
        ({"tasks": ["perplexity", "ruler"], "lengths": [300]}, "lengths: expected at least"),
        (
            {"tasks": ["perplexity", "ruler"], "tokenizer": lambda text: list(text.encode())},
            "tokenizer: expected one with decode",
        ),
    ],
)
def test_what_a_task_cannot_do_is_refused_before_anything_is_measured(tmp_path, change, message):
    with pytest.raises(ValueError) as refused:
        longrope.evaluate(build(), documents(), out=tmp_path / "run", **ASK | change)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    build().save_pretrained(place)
    (place / "text").mkdir()
    for number, document in enumerate(documents()):
        (place / "text" / f"{number}.txt").write_bytes(document.tobytes())
    tiny_models.factors("yarn", target=512).save(place / "mine.json")
    return place


def test_the_command_evaluate(folder, tmp_path):
    ask = ("evaluate", folder, folder / "text", "--lengths", "260,300", "--trials", 1,
           "--factors", folder / "mine.json", "--baselines", "yarn,cope", "--ladder",
           "--out", tmp_path / "run", "--device", "cpu")  # fmt: skip
    shown = call(*ask).stdout
    assert re.search(r"^mine +\d", shown, re.M) and "lm_eval --model hf" in shown
    header, entries = read(tmp_path / "run" / "journal.jsonl")
    assert len(entries) == 2 * 2 * 4
    tiers = header["factors"]
    # The model's own window is 32 tokens: 64, 128, 256 and the target lie beyond it.
    assert [t["target_length"] for t in tiers["mine"]] == [32, 64, 128, 256, 512]
    assert [t["target_length"] for t in tiers["cope"]] == [32, 300]
    assert call(*ask).stdout == shown
    assert json.loads((tmp_path / "run" / "config.json").read_text())["trials"] == 1


def test_the_command_passkey(folder, tmp_path, reports):
    ask = ("passkey", folder, "--lengths", "260,300", "--trials", 2, "--device", "cpu")
    shown = call(*ask, "--out", tmp_path / "new").stdout
    assert shown.startswith(str(longrope.passkey(build(), None, lengths=[260, 300], trials=2)))
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        "passkey.csv", "passkey.png", "passkey.json", "times.jsonl", "report.html", "results.csv",
        "plots",
    }  # fmt: skip
    with_factors = call(*ask, "--factors", folder / "mine.json", "--protocol", "longlora").stdout
    model = longrope.apply(build(), RescaleFactors.load(folder / "mine.json"))
    expected = longrope.passkey(model, None, lengths=[260, 300], trials=2, protocol="longlora")
    assert with_factors.strip() == str(expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("passkey", "--lengths", "many"), "--lengths: expected numbers like 512,1024"),
        (("passkey", "--lengths", "100"), "--lengths: expected at least 253 tokens"),
        (("passkey", "--lengths", "300", "--protocol", "x"), "--protocol: expected one of"),
        (("evaluate", "--lengths", "300", "--baselines", "magic"), "--baselines: expected some of"),
        (("evaluate", "--lengths", "300", "--tasks", "magic"), "--tasks: expected one of"),
        (
            ("evaluate", "--lengths", "20", "--tasks", "perplexity", "--baselines", "yarn"),
            "--lengths: expected one of at least 32 with --baselines",
        ),
        (
            ("passkey", "--lengths", "300", "--factors", "no.json"),
            "--factors: cannot read no.json: No such",
        ),
        (
            ("evaluate", "--lengths", "300", "--factors", "yarn.json", "--baselines", "yarn"),
            "--baselines: expected names that no file of --factors has, got 'yarn' twice",
        ),
    ],
)
def test_the_commands_refuse_in_one_sentence(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    tiny_models.factors("pi", target=512).save("yarn.json")
    command, *options = arguments
    data = (folder / "text", "--out", tmp_path / "run") if command == "evaluate" else ()
    said = call(command, folder, *data, *options, "--device", "cpu", code=2).stderr.strip()
    said = said.split("\n")[-1]
    assert said.startswith(f"longrope: {message}")


def test_a_folder_without_the_weights_of_a_head_is_refused(folder, tmp_path):
    """transformers fills the head with random numbers, and a run would measure those."""
    build().model.save_pretrained(tmp_path / "bare")
    data = (folder / "text", "--lengths", "300", "--out", tmp_path / "run")
    said = call("evaluate", tmp_path / "bare", *data, "--device", "cpu", code=2).stderr
    assert "MODEL: expected the weights of a causal language model" in said
    assert said.strip().endswith("without lm_head.weight")
