"""RULER-synthetic-6: prompts and scores against references made by hand, for two tokenizers."""

from __future__ import annotations

import collections
import csv
import re
import sys
import types

import numpy as np
import pytest
import torch
from support import tiny_models
from support.small_tokenizers import bpe
from torch import nn

import longrope
from longrope.evaluation import memory, ruler_words
from longrope.evaluation.generation import greedy
from longrope.evaluation.modes import evaluating
from longrope.evaluation.nll import NextTokenNLL
from longrope.evaluation.passkey import FILLER
from longrope.evaluation.prompts import PromptTokens
from longrope.evaluation.ruler import _prompts, contained
from longrope.evaluation.ruler_result import Ruler, Scored
from longrope.evaluation.ruler_tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")
#: Tokens that hold every task with this tokenizer.
LENGTHS = {"bytes": 2400, "bpe": 1800}


@pytest.fixture(scope="module")
def model():
    return tiny_models.build(vocab_size=320, pad_token_id=None)


def sample(name, units, length=1024, seed=0):
    return TASKS[name].make(units, length, np.random.default_rng(seed))


def test_niah_single_by_hand():
    prompt, (number,) = sample("niah_single_1", 3)
    needle = re.search(rf"One of the special magic numbers for (\S+) is: {number}\.", prompt)
    key = needle[1]
    lines = [FILLER] * 3
    where = prompt.split("\n").index(needle[0]) - 1
    lines.insert(where, needle[0])
    assert prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the number afterwards.\n" + "\n".join(lines) + "\nWhat is the special "
        f"magic number for {key} mentioned in the provided text? The special magic number for "
        f"{key} mentioned in the provided text is"
    )
    assert re.fullmatch("[1-9][0-9]{6}", number) and re.fullmatch("[a-z]+-[a-z]+", key)
    places = {sample("niah_single_1", 3, seed=s).prompt.index("One of the") for s in range(9)}
    assert len(places) == 3


@pytest.mark.parametrize("name, kind", [("niah_multikey_2", "number"), ("niah_multikey_3", "uuid")])
def test_niah_multikey_hides_it_among_needles(name, kind):
    prompt, (value,) = sample(name, 5)
    found = re.findall(rf"One of the special magic {kind}s for (\S+) is: (\S+)\.", prompt)
    assert len(found) == len({key for key, _ in found}) == 6
    query = re.search(rf"What is the special magic {kind} for (\S+) mentioned", prompt)[1]
    assert dict(found)[query] == value
    if kind == "uuid":
        assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", v) for _, v in found)


def test_variables_by_hand():
    prompt, names = sample("vt", 6)
    example, question = prompt.split("\n\nMemorize", 1)
    lines = [line for line in question.split("\n") if line.startswith("VAR")]
    value = lines[0].split(" = ")[1]
    assert lines == [f"VAR {names[0]} = {value}"] + [
        f"VAR {names[i + 1]} = VAR {names[i]}" for i in range(4)
    ]
    assert 10000 <= int(value) <= 99998 and all(re.fullmatch("[A-Z]{5}", n) for n in names)
    assert question.count(FILLER) == 6
    assert question.endswith(
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are assigned the value {value}, they are:"
    )
    solved = re.findall(r"they are: ([A-Z]{3}(?: [A-Z]{3}){4})$", example)
    assert len(solved) == 1 and not set(names) & set(solved[0].split())


@pytest.mark.parametrize("length, often, seldom", [(1024, 6, 1), (4096, 30, 3)])
def test_common_words_by_hand(length, often, seldom):
    prompt, common = sample("cwe", 25, length)
    listed = prompt.rsplit("Memorize the ones that appear most often.\n", 1)[1].split("\n")[0]
    numbers, words = zip(*re.findall(r"(\d+)\. (\S+)", listed), strict=True)
    assert numbers == tuple(str(n + 1) for n in range(10 * often + 15 * seldom))
    counts = collections.Counter(words)
    assert {w for w, c in counts.items() if c == often} == set(common) and len(common) == 10
    assert sorted(counts.values()) == [seldom] * 15 + [often] * 10
    example = prompt.split("\nBelow")[0]
    answer = example.split("appear most often in the list are: ")[1]
    top = collections.Counter(re.findall(r"\d+\. (\S+)", example.split("\n")[1])).most_common(10)
    assert {word for word, _ in top} == set(re.findall(r"\d+\. (\S+)", answer))


def test_more_common_words_than_the_language_has():
    prompt, _ = sample("cwe", len(ruler_words.single_words()) + 5)
    assert prompt.count("-") >= 5


def test_rulers_own_words_where_they_are_installed(monkeypatch):
    known = {"adjectives": ["red"], "nouns": ["fox", "owl"], "verbs": ["sit"], "noun": ["other"]}
    package = types.SimpleNamespace(RandomWord=lambda: types.SimpleNamespace(_categories=known))
    monkeypatch.setitem(sys.modules, "wonderwords", package)
    ruler_words.words.cache_clear()
    assert ruler_words.words() == (("red",), ("fox", "owl"), ("sit",))
    assert re.search("for red-(fox|owl) is:", sample("niah_single_1", 3).prompt)
    ruler_words.words.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    assert len(ruler_words.words()[1]) > 200
    ruler_words.words.cache_clear()


def test_frequent_words_by_hand():
    prompt, answer = sample("fwe", 200, length=1000)
    counts = collections.Counter(prompt.split("coded words. ", 1)[1].split("\nQuestion")[0].split())
    # 200 k^-2 / zeta(2), rounded down: 121.6, 30.4, 13.5, 7.6, 4.9, ...
    assert counts["..."] == 121
    assert [counts[word] for word in answer] == [30, 13, 7]
    assert sorted(counts.values(), reverse=True)[4] == 4
    assert all(re.fullmatch("[a-z]{6}", word) for word in answer)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", LENGTHS)
def test_prompts_fit_their_length_and_no_more_would(model, name, kind):
    tokenizer, length = bpe() if kind == "bpe" else None, LENGTHS[kind]
    tokens = PromptTokens(tokenizer, model)
    made = list(_prompts(tokens, ("", ""), name, length, 4, 0))
    room = length - TASKS[name].new_tokens
    sizes = [len(ids) for ids, _ in made]
    assert max(sizes) <= room
    assert min(sizes) > room - 300  # less than a unit and a half of haystack is missing
    for ids, found in made:
        assert tokens.decode(ids) == found.prompt
    assert len({found.references for _, found in made}) == 4


def test_scores_are_the_share_of_what_is_contained():
    assert contained(" abc is 1234567.", ("1234567",)) == 1
    assert contained("one, TWO\x07three", ("two", "three", "four", "ONE")) == 0.75
    assert contained("", ("a",)) == 0


class Parrot(nn.Module):
    """Goes on with the answers it was given, one for each prompt, then ends."""

    def __init__(self, answers):
        super().__init__()
        self.embedding = nn.Embedding(256, 4)
        self.answers, self.prompts = answers, []
        self.generation_config = types.SimpleNamespace(eos_token_id=[0, 255])

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, **kwargs):
        return types.SimpleNamespace(logits=torch.zeros(*input_ids.shape, 256))

    def generate(self, ids, max_new_tokens, **kwargs):
        rows = []
        for row in ids:
            text = bytes(row.tolist()).decode()
            self.prompts.append(text)
            answer = self.answers(text).encode()[: max_new_tokens - 1] + b"\x00"
            rows.append(torch.tensor(list(answer.ljust(max_new_tokens, b"?"))))
        return torch.cat([ids, torch.stack(rows)], dim=1)


def test_a_model_that_answers_scores_one_and_one_that_does_not_none():
    def right(prompt):
        key = re.search(r"magic number for (\S+) mentioned in the provided text is$", prompt)[1]
        return " " + re.search(rf"for {key} is: (\d+)", prompt)[1] + "."

    tasks = ["niah_single_1", "niah_multikey_2"]
    model = Parrot(right)
    found = longrope.ruler(model, None, lengths=[600, 900], tasks=tasks, samples=5)
    assert found.average(600)[::3] == (1, 10) and found.score(tasks[1], 900).mean == 1
    assert found.effective_length() == found.effective_length(0.856) == 900
    assert all("?" not in each.prediction for each in found.samples)  # the end was seen
    assert len(model.prompts) == len(set(model.prompts)) == 20
    wrong = longrope.ruler(Parrot(lambda _: " 1."), None, lengths=[600], tasks=tasks, samples=5)
    assert wrong.average(600).mean == 0 and wrong.effective_length() is None


@pytest.mark.parametrize("tiers", [None, "position", "row"])
def test_greedy_is_generate(tiers, monkeypatch):
    model = tiny_models.build(vocab_size=256, pad_token_id=None)
    if tiers:
        longrope.apply(model, tiny_models.factors("yarn").ladder(), tiers)
    ids = torch.randint(1, 256, (2, 90))
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    with evaluating(model):
        for chunk in (None, 40):
            if tiers == "row" and chunk:
                continue  # generate reads the prompt at once
            found = greedy(NextTokenNLL(model, chunk), ids, 12)
            assert found == expected[:, 90:].tolist()
        model.generation_config.eos_token_id = found[0][4]
        stopped = greedy(NextTokenNLL(model), ids, 12)
    assert stopped[0] == found[0][: found[0].index(found[0][4])]


def test_the_result_as_table_plot_and_file(tmp_path):
    scores = {100: [1.0, 1.0], 200: [1.0, 0.8], 400: [0.5, 0.0]}
    found = Ruler(tuple(
        Scored(task, n, n - 3, score, ("a", "b"), "text, with a comma")
        for n, pair in scores.items() for task in ("vt", "cwe") for score in pair
    ))  # fmt: skip
    assert found.effective_length() == 200 and found.effective_length(0.95) == 100
    assert found.score("vt", 400).mean == 0.25
    assert "tasks of RULER-synthetic-6" in str(found) and "200 tokens by 85 %" in str(found)
    found.save_csv(tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(rows) == 12 and rows[0]["prediction"] == "text, with a comma"
    found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="length: expected one that was measured"):
        found.average(300)


class Chat:
    """A tokenizer of bytes with a chat template."""

    chat_template = "yes"

    def __call__(self, text):
        return list(text.encode())

    def decode(self, ids, **kwargs):
        return bytes(ids).decode()

    def apply_chat_template(self, messages, **kwargs):
        return f"[user]{messages[0]['content']}[model]"


def test_the_chat_template_stands_around_the_question():
    model = Parrot(lambda _: "1")
    longrope.ruler(model, Chat(), lengths=[700], tasks=["niah_single_1"], samples=1, chat=True)
    (prompt,) = model.prompts
    assert prompt.startswith("[user]A special magic number is hidden")
    assert re.search(
        r"in the provided text\?\[model\]The special magic number for \S+ ment", prompt
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": [200]}, "lengths: expected at least "),
        ({"tasks": ["qa"]}, "tasks: expected one of 'niah_single_1'"),
        ({"tasks": "vt"}, "tasks: expected names of longrope.RULER_TASKS"),
        ({"tasks": []}, "tasks: expected names"),
        ({"tasks": 3}, "tasks: expected names of longrope.RULER_TASKS, got 3"),
        ({"samples": 0}, "samples: expected an integer of at least 1"),
        ({"chat": True}, "chat: expected a tokenizer with a chat template"),
        ({"tokenizer": lambda text: list(text.encode())}, "tokenizer: expected one with decode"),
        ({"model": nn.Linear(2, 2)}, "model: expected a causal language model with generate"),
    ],
)
def test_refusals_are_one_sentence(change, message):
    asked = {"model": Parrot(str), "tokenizer": None, "lengths": [600], "samples": 1} | change
    with pytest.raises(ValueError) as refused:
        longrope.ruler(asked.pop("model"), asked.pop("tokenizer"), **asked)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_long_prompts_go_in_chunks(monkeypatch):
    model = tiny_models.build(vocab_size=256, pad_token_id=None)
    asked = {"lengths": [700], "tasks": ["niah_single_1"], "samples": 2}
    whole = longrope.ruler(model, None, **asked)
    monkeypatch.setattr(memory, "CPU_TOKENS_PER_BATCH", 128)
    monkeypatch.setattr(memory, "LEAST_CHUNK", 128)
    assert longrope.ruler(model, None, **asked).samples == whole.samples
