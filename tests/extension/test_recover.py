"""`longrope.recover`: short tiers by search alone."""

import json
import math

import pytest
import torch
from support import families, tiny_models
from support.commands import call, write_letters
from support.extension_runs import documents
from support.tiny_search import build_model

import longrope
from longrope.errors import NotFiniteError
from longrope.extension import short_search
from longrope.extension.folder import weights_hash

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"lengths": [16, 32], "steps": 3, "samples": 2}


def extended(**changes):
    """Return a model under one long set, which loses on short texts."""
    model = build_model()
    rope = longrope.rope_settings(model)
    factors = longrope.RescaleFactors.pi(**rope.lengths(128)).replace(**changes)
    return longrope.apply(model, factors)


@pytest.fixture(scope="module")
def found():
    model = extended()
    return longrope.recover(model, documents(), **OPTIONS), model


def test_the_tiers_are_the_recovered_ones_and_then_the_long_ones(found):
    result, model = found
    long = model.model.rotary_emb.tiers[0]
    assert result.tiers.limits == (16, 32, 128)
    assert result.tiers[-1] == long
    assert result.lengths == (16, 32)
    assert [factors.target_length for factors in result.by_length] == [16, 32]


def test_the_weights_and_the_factors_of_the_model_stay(found):
    result, model = found
    assert result.weights == weights_hash(build_model()) == weights_hash(model)
    assert len(model.model.rotary_emb.tiers) == 1


def test_short_texts_come_back(found):
    result, _ = found
    ways = result.perplexities
    original = ways["the original model"][0]
    long = ways["the long set for every position"][0]
    # On windows that chose: never worse than the model as loaded, nor than the long set.
    assert ways["recovered, by position"][0] <= min(original, long) * (1 + 1e-5)
    shown = result.table()
    assert all(name in shown for name in ways)
    assert len(ways) == 5


def test_by_length_is_the_rule_of_the_paper(found):
    result, _ = found
    model = longrope.apply(build_model(), result.by_length[1])
    texts = documents()
    search = short_search.ShortSearch(
        model, texts, longrope.Tiers(result.tiers[-1:]), None, steps=3, samples=2,
        max_lambda=None, seed=0, journal=None,
    )  # fmt: skip
    windows = search.held_out(32)
    expected = longrope.perplexity(model, windows, length=32, stride=32)
    assert result.perplexities["recovered, by the length of the row (the paper)"][1] == (
        pytest.approx(float(expected))
    )


def test_it_is_judged_against_the_original_model(found):
    other = build_model()
    with torch.no_grad():
        other.lm_head.weight *= 0.5
    result = longrope.recover(extended(), documents(), **OPTIONS, original=other)
    expected = found[0].perplexities
    changed = [name for name in expected if result.perplexities[name] != expected[name]]
    assert changed == ["the original model"]


def test_factors_stay_below_the_bound():
    # Large steps, which would leave any bound.
    result = longrope.recover(extended(), documents(), **OPTIONS, max_lambda=1.5)
    assert all(f.lambdas.min() >= 1 and f.lambdas.max() <= 1.5 for f in result.by_length)


def test_a_recovery_resumes_to_the_bit(found, tmp_path, monkeypatch):
    own = short_search.ShortSearch.recorded
    calls = []

    def stopping(self, measure):
        calls.append(1)
        if len(calls) in (4, 9):
            raise KeyboardInterrupt
        return own(self, measure)

    monkeypatch.setattr(short_search.ShortSearch, "recorded", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            longrope.recover(extended(), documents(), **OPTIONS, out=tmp_path)
    result = longrope.recover(extended(), documents(), **OPTIONS, out=tmp_path)
    assert result.tiers == found[0].tiers
    assert result.perplexities == found[0].perplexities
    assert longrope.Tiers.load(tmp_path / "tiers.json") == result.tiers
    assert json.loads((tmp_path / "config.json").read_text())["options"]["lengths"] == [16, 32]
    for changes, message in (
        ({"seed": 1}, r"another recovery \(seed: 0 there, 1 here\)"),
        ({"test": documents()}, r"another recovery \(test: null there"),
        ({"original": build_model()}, r"another recovery \(original: null there"),
    ):
        with pytest.raises(ValueError, match=message):
            longrope.recover(extended(), documents(), **OPTIONS, **changes, out=tmp_path)


def test_perplexities_that_overflow_are_kept_and_taken_again(tmp_path):
    model = extended()
    with torch.no_grad():
        model.lm_head.weight *= 300
    first = longrope.recover(model, documents(), **OPTIONS, out=tmp_path)
    assert set(sum(first.perplexities.values(), ())) == {math.inf}
    assert longrope.recover(model, documents(), **OPTIONS, out=tmp_path) == first


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": []}, "lengths: expected a list of lengths"),
        ({"lengths": [32, 16]}, r"lengths that grow, got \[32, 16\]"),
        ({"lengths": [128]}, "less than the target length of the factors, 128, got 128"),
        ({"lengths": [151]}, "less than the target length"),
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"max_lambda": 0.5}, "max_lambda: expected a finite number above 1"),
        ({"test": [torch.arange(20)]}, r"test\[0\]: expected at least 32 tokens, got 20"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        longrope.recover(extended(), documents(), **OPTIONS | changes)


def test_factors_under_which_the_model_is_not_finite_are_never_chosen(tmp_path, monkeypatch):
    own, judge = short_search.PopulationEvaluator.__call__, short_search.perplexity
    loaded = longrope.rope_settings(build_model()).loaded

    def measured(self, candidates, windows):
        if len(candidates) == 1:
            return [math.nan]  # what the descent finds
        _, *rest = own(self, candidates, windows)
        return [math.nan, *rest]  # the first is the model as loaded

    def judged(model, *args, **options):
        if (model.model.rotary_emb.tiers[0].lambdas == loaded.lambdas).all():
            raise NotFiniteError("nan")
        return judge(model, *args, **options)

    monkeypatch.setattr(short_search.PopulationEvaluator, "__call__", measured)
    monkeypatch.setattr(short_search, "perplexity", judged)
    found = longrope.recover(extended(), documents(), lengths=[16], steps=3, out=tmp_path)
    for factors in (found.by_length[0], found.tiers[0]):
        assert (factors.lambdas != loaded.lambdas).any()
    monkeypatch.setattr(
        short_search.PopulationEvaluator, "__call__", lambda self, c, w: [math.nan] * len(c)
    )
    with pytest.raises(NotFiniteError, match="not finite under any of the"):
        longrope.recover(extended(), documents(), lengths=[16], steps=3)


def test_a_model_without_factors_is_refused():
    with pytest.raises(ValueError, match="expected a model with factors applied"):
        longrope.recover(build_model(), documents(), **OPTIONS)


def test_what_tiers_cannot_be_found_for_is_refused_before_a_folder_is_made(tmp_path):
    import numpy as np

    def refused(message, model):
        with pytest.raises(ValueError, match=message):
            longrope.recover(model, texts, **OPTIONS, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    texts = documents()
    one = extended().model.rotary_emb.tiers[0]
    each = one.spread(2, 1)
    each = each.replace(lambdas=each.lambdas * np.array([1.0, 1.1])[:, None, None])
    refused(r"those of each; apply one_set\(\)", longrope.apply(build_model(), each))
    model = families.build("gpt_oss")
    factors = longrope.RescaleFactors.yarn(**longrope.rope_settings(model).lengths(128))
    refused("model: expected a family .* got gpt-oss", longrope.apply(model, factors))


def test_the_command_takes_lengths_with_commas_and_the_flag_again(tmp_path):
    model = tiny_models.build(vocab_size=256, pad_token_id=None, max_position_embeddings=16)
    rope = longrope.rope_settings(model)
    longrope.export(model, tmp_path / "model", longrope.RescaleFactors.pi(**rope.lengths(64)))
    text = write_letters(tmp_path / "text.txt")
    command = ["recover", tmp_path / "model", text, "--device", "cpu", "--out", tmp_path / "run"]
    call(*command, "--lengths", "8,16", "--lengths", 32, "--steps", 1, "--samples", 1)
    assert longrope.Tiers.load(tmp_path / "run" / "tiers.json").limits == (8, 16, 32, 64)
    error = call(*command, "--lengths", "8;16", code=2).stderr
    assert error == "longrope: --lengths: expected numbers like 512,1024, got '8;16'\n"
