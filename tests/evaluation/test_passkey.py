"""Passkey retrieval: the prompts of two tokenizers, and what counts as right."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from support import tiny_models
from support.small_tokenizers import bpe
from torch import nn

import longrope
from longrope import RescaleFactors
from longrope.evaluation import memory
from longrope.evaluation.passkey import FILLER, QUESTION, TASK, cut_by_characters, token_exact
from longrope.evaluation.passkey_result import Passkey, Trial
from longrope.evaluation.prompts import PromptTokens
from longrope.report.intervals import bootstrap_interval, proportion_interval

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_models.build(vocab_size=320, pad_token_id=None)


@pytest.fixture(scope="module")
def bytes_model():
    return tiny_models.build(vocab_size=256, pad_token_id=None)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_prompt_in_bytes_by_hand(bytes_model):
    tokens = PromptTokens(None, bytes_model)
    prompt = token_exact(tokens, 400, 4, trial=2, random=rng())
    random = rng()
    key = "".join(map(str, random.integers(0, 10, size=5)))
    place = (2 + random.random()) / 4
    line = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    end = f"\n{QUESTION} {key}"
    room = 400 - len(TASK) - 1 - len(line) - len(end)
    before = round(place * room)
    filler = (FILLER + " ") * 5
    text = f"{TASK}\n{filler[:before]}{line}{filler[: room - before]}{end}"
    assert bytes(prompt.ids).decode() == text
    assert (len(text), prompt.key, prompt.answer) == (400, key, 6)
    assert 0.5 <= prompt.depth < 0.75


@pytest.mark.parametrize("length", [150, 151, 210, 260])
@pytest.mark.parametrize("bos", [False, True])
def test_any_tokenizer_gives_exact_lengths(model, length, bos):
    tokenizer = bpe(bos)
    tokens = PromptTokens(tokenizer, model)
    prompt = token_exact(tokens, length, 10, trial=7, random=rng())
    assert len(prompt.ids) == length
    assert (prompt.ids[0] == tokenizer.bos_token_id) == bos
    text = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    assert text.startswith(TASK) and text.endswith(f"{QUESTION} {prompt.key}")
    assert text.count(prompt.key) == 3 and (length < 260 or FILLER in text)
    assert tokens.decode(prompt.ids[-prompt.answer :]) == f" {prompt.key}"
    assert tokens.decode(prompt.ids[: -prompt.answer]).endswith(QUESTION)


def test_a_token_across_the_joint_belongs_to_the_answer(model):
    class Pairs:
        """Two characters are a token, from the left."""

        def __call__(self, text):
            return [sum(map(ord, text[i : i + 2])) % 320 for i in range(0, len(text), 2)]

    tokens = PromptTokens(Pairs(), model)
    assert tokens.split("abc", "de") == (tokens("ab"), tokens("cde"))
    assert tokens.split("ab", "cd") == (tokens("ab"), tokens("cd"))


def test_longloras_filler_is_cut_between_characters(model):
    tokens = PromptTokens(bpe(), model)
    made = [cut_by_characters(tokens, 200, 1, t, rng(t)) for t in range(8)]
    assert all(190 < len(prompt.ids) <= 200 for prompt in made)
    assert all(1 <= int(prompt.key) <= 50000 for prompt in made)
    assert len({round(prompt.depth, 3) for prompt in made}) == 8


class Oracle(nn.Module):
    """Logits that favour the token it is told, at every place but those it is to miss."""

    def __init__(self, wrong=()):
        super().__init__()
        self.embedding = nn.Embedding(256, 4)
        self.wrong = set(wrong)  # of the last tokens, counted from the end

    def get_input_embeddings(self):
        return self.embedding

    def generate(self):
        raise NotImplementedError

    def forward(self, input_ids, **kwargs):
        targets = torch.roll(input_ids, -1, dims=1)
        logits = 5.0 * nn.functional.one_hot(targets, 256).float()
        for place in self.wrong:
            logits[:, -1 - place] = logits[:, -1 - place].flip(-1)
        return type("Output", (), {"logits": logits})


def test_right_is_every_token_of_the_key():
    # The last logits predict nothing, so 1 is the last digit, 5 the first, 6 the space, 7 outside.
    for wrong, right in (((), 3), ((1,), 0), ((6,), 0), ((7,), 3)):
        found = longrope.passkey(Oracle(wrong), None, lengths=[300], trials=3)
        assert found.accuracy(300)[:2] == (right, 3)
    assert found.nll(300) == pytest.approx(math.log(1 + 255 * math.exp(-5)), rel=1e-5)


def test_right_is_what_generate_gives(bytes_model):
    # A model that copies nothing is right where its greedy text happens to be the key: ask for a
    # key that it does write.
    prompt = token_exact(PromptTokens(None, bytes_model), 300, 1, 0, rng())
    before = torch.tensor([prompt.ids[: -prompt.answer]])
    written = bytes_model.generate(before, max_new_tokens=6, do_sample=False)
    from longrope.evaluation.modes import evaluating
    from longrope.evaluation.nll import NextTokenNLL

    with evaluating(bytes_model):
        for chunk in (None, 64):
            score = NextTokenNLL(bytes_model, chunk)
            assert score.answers(written, 6)[1].all()
            other = written.clone()
            other[0, -3] = (other[0, -3] + 1) % 256
            right = score.answers(other, 6)[1]
            assert right[0, :3].all() and not right[0, 3]


@pytest.mark.parametrize("tiers", [None, "one", "position", "row"])
def test_chunks_and_batches_change_nothing(bytes_model, tiers, monkeypatch):
    model = bytes_model
    if tiers is not None:
        yarn = tiny_models.factors("yarn", target=512)
        sets = yarn if tiers == "one" else yarn.ladder()
        longrope.apply(model, sets, "row" if tiers == "row" else "position")
    ask = {"lengths": [280, 400], "trials": 3}
    whole = longrope.passkey(model, None, batch_size=1, **ask)
    monkeypatch.setattr(memory, "CPU_TOKENS_PER_BATCH", 64)
    monkeypatch.setattr(memory, "LEAST_CHUNK", 64)
    cut = longrope.passkey(model, None, **ask)
    longrope.remove(model)
    for one, other in zip(whole.trials, cut.trials, strict=True):
        assert one._replace(nll=0) == other._replace(nll=0)
        assert one.nll == pytest.approx(other.nll, abs=1e-4)
    assert len({trial.nll for trial in whole.trials}) == 6


def test_factors_matter_and_trials_do_not_depend_on_their_company(bytes_model):
    both = longrope.passkey(bytes_model, None, lengths=[280, 400], trials=2)
    alone = longrope.passkey(bytes_model, None, lengths=[400], trials=2)
    for one, other in zip(both.at(400), alone.trials, strict=True):
        assert one.key == other.key and one.nll == pytest.approx(other.nll, abs=1e-5)
    again = longrope.passkey(bytes_model, None, lengths=[400], trials=2, seed=1)
    assert {t.key for t in again.trials}.isdisjoint(t.key for t in alone.trials)
    longrope.apply(bytes_model, RescaleFactors.pi(**{
        "original_length": 32, "target_length": 400, "rotary_dim": 16,
    }))  # fmt: skip
    assert longrope.passkey(bytes_model, None, lengths=[400], trials=2).nll(400) != alone.nll(400)
    longrope.remove(bytes_model)


def some_result():
    trials = [Trial(100, 100, (t + 0.5) / 10, "12345", t >= 3, 0.5) for t in range(10)]
    return Passkey((*trials, *(Trial(200, 198, 0.05, "54321", False, 2.0) for _ in range(10))))


def test_the_result_as_table_map_and_file(tmp_path):
    found = some_result()
    assert found.accuracy(100)[:2] == (7, 10) and found.accuracy(200).share == 0
    assert found.nll(100) == 0.5 and found.lengths == (100, 200)
    bands = found.bands()
    assert bands[:, 0].tolist() == [0.0] * 3 + [1.0] * 7
    assert bands[0, 1] == 0 and np.isnan(bands[1:, 1]).all()
    assert "7/10 (35% to 93%)" in str(found) and "198 tokens" in str(found)
    found.save_csv(tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(rows) == 20 and rows[3]["right"] == "1" and rows[0]["key"] == "12345"
    found.plot(tmp_path / "a.png", title="a model")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="length: expected one of 100, 200, got 300"):
        found.accuracy(300)


def test_intervals():
    # Clopper and Pearson by closed forms: all of n is (0.025^(1/n), 1); 7 of 10 by tables.
    assert proportion_interval(10, 10) == (pytest.approx(0.025**0.1), 1.0)
    assert proportion_interval(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1))
    assert proportion_interval(7, 10) == pytest.approx((0.3475, 0.9333), abs=1e-4)
    low, high = proportion_interval(1500, 3000)  # 3000! overflows a float
    assert 0.48 < low < 0.5 < high < 0.52
    values = rng().normal(3.0, 1.0, 400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)
    assert all(map(math.isnan, bootstrap_interval([])))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": [200]}, "lengths: expected at least 253 tokens, which the prompt has without"),
        ({"lengths": []}, "lengths: expected one or more numbers of tokens"),
        ({"lengths": 512}, "lengths: expected one or more numbers of tokens"),
        ({"lengths": [300.5]}, "lengths: expected an integer"),
        ({"trials": 0}, "trials: expected an integer of at least 1"),
        ({"depths": 0}, "depths: expected an integer of at least 1"),
        ({"protocol": "x"}, "protocol: expected one of 'longrope'"),
        ({"protocol": "longlora", "lengths": [200]}, "lengths: expected at least "),
        ({"tokenizer": 3}, "tokenizer: expected a tokenizer or a function"),
        ({"tokenizer": lambda text: [999] * len(text)}, "tokenizer: expected ids within"),
        ({"tokenizer": lambda text: [-1] * len(text)}, "tokenizer: expected ids within"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        (
            {"model": longrope.LongRoPEModel(16, 2, 1, 32)},
            "model: expected a Hugging Face causal language model, got LongRoPEModel, which takes "
            "no input_ids; its .llama is one",
        ),
        ({"model": nn.Linear(2, 2)}, "model: expected a causal language model with generate"),
        ({"model": 3}, "model: expected a causal language model with generate"),
    ],
)
def test_refusals_are_one_sentence(bytes_model, change, message):
    asked = {"model": bytes_model, "tokenizer": None, "lengths": [300], "trials": 1} | change
    with pytest.raises(ValueError) as refused:
        longrope.passkey(asked.pop("model"), asked.pop("tokenizer"), **asked)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_model_of_nan_is_named():
    model = tiny_models.build(vocab_size=256, pad_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the NLL of a key in a prompt of 300 tokens is nan"):
        longrope.passkey(model, None, lengths=[300], trials=1)
