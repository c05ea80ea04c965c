"""`fit`, `extend_context`, `recover_short_context`, and what a model is on disk."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import torch
from support import tiny_models
from support.small_model import BASE, build, ids
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import longrope
from longrope import LongRoPEModel, RescaleFactors

TARGET = 4 * BASE
QUICK = {"steps": 2, "samples": 1, "progress": False}


@pytest.fixture
def documents():
    """Counting texts: every token follows from the one before it."""
    random = np.random.default_rng(0)
    lengths = (10, 2 * BASE + 5, 2 * TARGET, 3 * TARGET, 2 * TARGET)
    return [((np.arange(n) + random.integers(64)) % 64).astype(np.uint8) for n in lengths]


@pytest.fixture
def trained():
    model = build()
    model.trained = True
    return model


def test_the_example_of_the_readme(tmp_path, one_thread):
    (tmp_path / "book.txt").write_text("In the beginning. " * 400)
    data = longrope.load_data(tmp_path / "book.txt")
    model = LongRoPEModel(d_model=64, n_heads=8, num_layers=6, base_length=64)
    with pytest.warns(UserWarning, match="the model has random weights") as caught:
        model = model.extend_context(data, 2048)
    assert len(caught) == 1 and caught[0].filename == __file__
    output = model(torch.randn(2, 2048, 64))
    assert output.shape == (2, 2048, 64) and output.isfinite().all()
    assert model.context_length == 2048
    assert model.tiers == RescaleFactors.yarn(**model.rope.lengths(2048)).ladder()


def test_yarn_that_is_asked_for_needs_no_data_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build().extend_context(None, target_length=TARGET, method="yarn")
    assert model.tiers.limits == (BASE, 2 * BASE, TARGET)


def test_a_ladder_is_the_one_that_was_searched(trained, documents, one_thread):
    long = documents[2:]
    found = longrope.search(trained.llama, long, target_length=TARGET, ladder=True, **QUICK)
    model = trained.extend_context(long, TARGET, ladder=True, **QUICK)
    assert model.tiers == found.tiers
    assert found.tiers != found.factors.ladder(loaded=model.rope.loaded)


def test_factors_by_head_are_refused_before_anything_is_searched(trained, documents, tmp_path):
    run = {"per": "head", "out": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"per: expected 'model'.* got 'head'"):
        trained.extend_context(documents, TARGET, **run)
    trained.extend_context(None, TARGET, method="yarn")
    with pytest.raises(ValueError, match=r"per: expected 'model'.* got 'head'"):
        trained.recover_short_context(documents, **run)
    assert not (tmp_path / "run").exists()
    before = trained.tiers
    by_head = RescaleFactors.yarn(**trained.rope.lengths(TARGET)).spread(2, 2)
    with pytest.raises(ValueError, match=r"tiers: expected factors for all .* one_set\(\)"):
        trained.set_tiers(by_head)
    assert trained.tiers == before


def test_fit_lowers_the_loss_and_repeats(documents, one_thread, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = torch.from_numpy(documents[3][:BASE].astype(np.int64))[None]
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        model = build(scale=1.0)
        before = model(text, labels=text).loss
        same = model.fit(
            documents, steps=40, batch_size=4, learning_rate=1e-2, seed=1, progress=False
        )
        assert same is model and model.trained and not model.training
        assert model(text, labels=text).loss < before - 1
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert capsys.readouterr().out == "" and not os.listdir(tmp_path)


def test_fit_takes_longer_windows_after_an_extension(documents, one_thread):
    model = build(target=TARGET)
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, given: seen.append(tuple(given["inputs"].shape)), with_kwargs=True
    )
    model.fit(documents, steps=2, batch_size=2, length=TARGET, progress=False)
    assert seen == [(2, TARGET)] * 2
    assert model.context_length == TARGET


def test_extension_of_a_trained_model_searches(documents, trained, one_thread, tmp_path):
    weights = {name: value.clone() for name, value in trained.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = trained.extend_context(documents, TARGET, out=tmp_path / "run", **QUICK)
    found = RescaleFactors.load(tmp_path / "run" / "factors.json")
    assert model is trained and model.tiers == found.ladder()
    assert longrope.patching.rotary_of(model.llama).tiers == model.tiers
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    again = model.extend_context(documents, TARGET, **QUICK)
    assert again.tiers == found.ladder()  # counted from the base, not from the first extension


def test_a_search_that_fails_leaves_the_tiers(documents, trained):
    before = trained.extend_context(None, TARGET, method="yarn").tiers
    with pytest.raises(ValueError, match="steps"):
        trained.extend_context(documents, 2 * TARGET, steps=0)
    assert trained.tiers == before
    assert longrope.patching.rotary_of(trained.llama).tiers == before


def test_recovery_replaces_a_tier_that_is_worse(documents, trained, one_thread, tmp_path):
    model = trained.extend_context(None, TARGET, method="yarn")
    first, _, last = model.tiers
    bad = RescaleFactors.none(**model.rope.lengths(2 * BASE)).replace(attention_factor=9.0)
    longest = [d for d in documents if len(d) >= 2 * BASE]

    def perplexity():
        span = {"length": 2 * BASE, "stride": 2 * BASE, "ranges": [(BASE, 2 * BASE)]}
        return longrope.perplexity(model.llama, [d[: 2 * BASE] for d in longest], **span)

    model.set_tiers([first, bad, last])
    before = perplexity()
    assert model.recover_short_context(documents, out=tmp_path, **QUICK) is model
    assert (tmp_path / str(2 * BASE) / "factors.json").is_file()
    assert [model.tiers[0], model.tiers[2]] == [first, last]
    assert model.tiers[1] != bad and model.tiers.limits == (BASE, 2 * BASE, TARGET)
    after = perplexity()
    assert after.by_range[0] < before.by_range[0]
    # A tier that no search beats stays: the one just found, by the same search.
    kept = model.tiers
    assert model.recover_short_context(documents, **QUICK).tiers == kept


def test_recovery_of_random_weights_says_that_it_is_none(documents):
    model = build(target=TARGET)
    before = model.tiers
    with pytest.warns(UserWarning, match="random weights") as caught:
        model.recover_short_context(documents)
    assert len(caught) == 1 and model.tiers == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: m.extend_context(d, BASE), "target_length: expected more than base_length"),
        (lambda m, d: m.extend_context(d, 2.5), "target_length: expected an integer"),
        (lambda m, d: m.extend_context(d, TARGET, method="pi"), "method: expected one of"),
        (lambda m, d: m.extend_context(d, 8 * TARGET), "data holds no document of at least 1024"),
        (lambda m, d: m.extend_context([[64]], TARGET), "data[0]: token id 64 is outside"),
        (lambda m, d: m.extend_context("text", TARGET), "data: expected a list of documents"),
        (lambda m, d: m.extend_context(None, TARGET), "data: expected a list of documents"),
        (
            lambda m, d: m.extend_context(d, TARGET, method="yarn", steps=3),
            "steps: expected no options of a search with method='yarn'",
        ),
        (lambda m, d: m.recover_short_context(d), "model: expected tiers by position"),
        (
            lambda m, d: m.set_tiers(m.extend_context(None, TARGET, method="yarn").tiers)
            .recover_short_context(d, lengths=[BASE]),
            "lengths: expected lengths above base_length, 32, and below",
        ),
        (
            lambda m, d: m.extend_context(None, TARGET, method="yarn")
            .recover_short_context(d, lengths=2 * BASE),
            "lengths: expected numbers of tokens, got 64",
        ),
        (lambda m, d: m.generate(d[0]), "input_ids: expected token ids [B, N]"),
        (lambda m, d: m.generate([[1, 2]]), "input_ids: expected token ids [B, N]"),
        (lambda m, d: m.fit(d, steps=0), "steps: expected an integer of at least 1, got 0"),
        (lambda m, d: m.fit(d, length=10**6), "data holds no document of at least 1000000"),
        (lambda m, d: m.fit([], steps=1), "data: expected at least one document"),
        (lambda m, d: m.load("nowhere"), "path: expected a folder with a config.json"),
        (lambda m, d: LongRoPEModel.from_llama(3), "llama: expected a LlamaForCausalLM, got int"),
    ],
)  # fmt: skip
def test_bad_calls(call, message, documents, trained):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call(trained, documents)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, TARGET], ids=["base", "tiers"])
def test_saved_models_come_back(target, tmp_path, one_thread):
    model, tokens = build(target=target, dtype=torch.bfloat16), ids()
    folder = model.save(tmp_path / "model")
    files = {"config.json", "generation_config.json", "model.safetensors", "tiers.json"}
    assert set(os.listdir(folder)) == files
    back = LongRoPEModel.load(folder)
    assert back.tiers == model.tiers and not back.trained and back.dtype == torch.bfloat16
    assert torch.equal(back(tokens), model(tokens))
    with pytest.raises(ValueError, match="path: expected a new or an empty folder"):
        model.save(tmp_path / "model")
    back.trained = True
    assert LongRoPEModel.load(back.save(tmp_path / "again")).trained
    assert not hasattr(model.llama.config, "longrope_trained")
    assert LongRoPEModel.load(folder, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("target", [None, TARGET], ids=["base", "tiers"])
def test_an_export_of_random_weights_says_that_they_are(target, tmp_path, one_thread):
    model = build(target=target)
    with pytest.warns(UserWarning, match="random, and those of the export are too") as caught:
        folder = model.export(tmp_path / "random")
    assert len(caught) == 1
    back = LongRoPEModel.load(folder)
    assert not back.trained
    assert not hasattr(back.llama.config, "longrope_trained")
    assert not hasattr(model.llama.config, "longrope_trained")
    back.trained = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LongRoPEModel.load(back.export(tmp_path / "trained")).trained


def test_an_export_has_the_logits_of_plain_transformers(tmp_path, one_thread):
    model, tokens = build(), ids()
    plain = AutoModelForCausalLM.from_pretrained(model.export(tmp_path / "base"))
    torch.testing.assert_close(plain(tokens).logits.detach(), model(tokens), rtol=1e-4, atol=1e-4)
    assert type(plain) is LlamaForCausalLM
    model.extend_context(None, TARGET, method="yarn")
    folder = model.export(tmp_path / "extended")
    by_position, _ = longrope.load(folder)
    torch.testing.assert_close(
        by_position(tokens).logits.detach(), model(tokens), rtol=1e-4, atol=1e-4
    )
    back = LongRoPEModel.load(folder)
    assert back.tiers == model.tiers and torch.equal(back(tokens), model(tokens))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model.set_tiers(model.tiers[-1])
    torch.testing.assert_close(plain(tokens).logits.detach(), model(tokens), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="short: expected no options"):
        build().export(tmp_path / "options", short="none")


def test_any_llama_is_taken_with_its_own_scaling(tmp_path, one_thread):
    scaling = {"rope_type": "linear", "factor": 2.0}
    llama = tiny_models.build(rope=scaling, max_position_embeddings=2 * BASE)
    llama.save_pretrained(tmp_path / "llama")
    model, tokens = LongRoPEModel.load(tmp_path / "llama"), ids(length=2 * BASE)
    assert model.trained and model.base_length == 2 * BASE
    theirs = model.llama(tokens).logits.detach()
    torch.testing.assert_close(model(tokens), theirs, rtol=1e-4, atol=1e-4)
    extended = model.extend_context(None, 4 * BASE, method="yarn")
    torch.testing.assert_close(extended(tokens), theirs, rtol=1e-4, atol=1e-4)


def test_other_models_are_refused(tmp_path):
    tiny_models.build("mistral").save_pretrained(tmp_path / "mistral")
    with pytest.raises(ValueError, match="llama: expected a LlamaForCausalLM, got MistralFor"):
        LongRoPEModel.load(tmp_path / "mistral")
    dynamic = tiny_models.build(rope={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match='got rope type "dynamic"'):
        LongRoPEModel.from_llama(dynamic)


def test_generation_crosses_tiers_as_one_prefill(one_thread):
    model, tokens = build(target=TARGET), ids(1, BASE - 4)
    made = model.generate(tokens, max_new_tokens=2 * BASE, do_sample=False)
    assert made.shape == (1, 3 * BASE - 4)
    assert torch.equal(
        model(made)[0, len(tokens[0]) - 1 : -1].argmax(-1), made[0, len(tokens[0]) :]
    )
