"""The packaged model that retrieves: in its window, beyond it, and how it was made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import longrope
from longrope.demo import RETRIEVER, retrieval_text, train_retriever
from longrope.demo.retrieval_text import ANSWER, COPIED, TEXT, windows
from longrope.evaluation.passkey import QUESTION
from longrope.factors.baselines import BASELINES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def retriever():
    return AutoModelForCausalLM.from_pretrained(RETRIEVER, dtype=torch.float32).eval()


def test_finds_every_key_in_its_window_and_llama3s_rule_finds_them_beyond(retriever):
    assert longrope.passkey(retriever, None, lengths=[512], trials=12).accuracy(512).right >= 11
    beyond = longrope.passkey(retriever, None, lengths=[1024], trials=12)
    rope = longrope.rope_settings(retriever)
    longrope.apply(retriever, BASELINES["llama3"](**rope.lengths(2048)).ladder())
    found = longrope.passkey(retriever, None, lengths=[512, 1024], trials=12)
    assert found.accuracy(512).right >= 11  # the window stays what it was
    assert found.accuracy(1024).right >= 10
    assert beyond.nll(1024) > 3 * found.nll(1024)


def test_the_packaged_tiers_find_keys_at_eight_windows_where_yarn_loses_most(retriever):
    """What `benchmarks/retrieval.py` found: 55 of 60 prompts, YaRN 27; here the first of them."""
    ask = {"lengths": [4096], "trials": 4}
    rope = longrope.rope_settings(retriever)
    yarn = BASELINES["yarn"](**rope.lengths(4096)).ladder()
    tiers = longrope.Tiers.load(RETRIEVER / "tiers.json")
    assert tiers.limits == (512, 640, 1280, 2560, 5120) and tiers[0] == rope.loaded
    found = {}
    for name, sets in (("yarn", yarn), ("searched", tiers)):
        longrope.apply(retriever, sets)
        found[name] = longrope.passkey(retriever, None, **ask)
    assert found["searched"].accuracy(4096).right >= 3
    assert found["searched"].accuracy(4096).right > found["yarn"].accuracy(4096).right
    assert found["yarn"].nll(4096) > 3 * found["searched"].nll(4096)


def test_finds_needles_of_ruler(retriever):
    found = longrope.ruler(retriever, None, lengths=[640], tasks=["niah_single_1"], samples=6)
    assert found.average(640).mean >= 0.5
    # The prompt fits the window of 512; the tokens to generate lie beyond it.
    assert max(sample.tokens for sample in found.samples) <= 512


@pytest.mark.parametrize("length", [128, 256, 512])
def test_training_windows_hold_their_answers(length):
    ids, weights = windows(np.random.default_rng(0), 60, length)
    assert ids.shape == weights.shape == (60, length) and ids.max() < 256
    assert set(np.unique(weights)) == set(map(np.float32, (0, TEXT, COPIED, ANSWER)))
    asked = weights.max(1) == ANSWER
    assert 10 < asked.sum() < 35
    for row, weight in zip(ids[asked], weights[asked], strict=True):
        text = bytes(row.tolist()).decode()
        key = text[-5:]
        assert text.endswith(f"{QUESTION} {key}") and text.count(key) >= 3
        assert (weight[-5:] == ANSWER).all() and (weight == 0).sum() == 5


def test_needles_are_asked_for_as_ruler_asks():
    window = retrieval_text._needles(np.random.default_rng(1), 512)
    text = bytes(window.ids).decode()
    assert len(text) == 512
    assert text.count("One of the special magic numbers for") == text.count(
        "mentioned in the provided text is"
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_script_trains_and_saves(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_retriever, "STAGES", ((128, 2, 2), (256, 2, 1)))
    monkeypatch.setattr(train_retriever, "REPORT", 3)
    train_retriever.main(["--out", str(tmp_path), "--kind", kind])
    assert "step 3/3, windows of 256" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.config.model_type == kind and model.dtype == torch.bfloat16
    torch.manual_seed(0)
    fresh = train_retriever.build_model(kind)
    moved = [
        not torch.allclose(new.float(), old, atol=1e-6)
        for new, old in zip(model.parameters(), fresh.parameters(), strict=True)
    ]
    assert sum(moved) > 0.5 * len(moved)  # in bfloat16 some norms round back to 1
