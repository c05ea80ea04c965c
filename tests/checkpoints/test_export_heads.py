"""Exports of factors by layer and head: readers get one set, `longrope.load` the tiers."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from support import tiny_models
from support.tiny_models import tokens

import longrope
from longrope.checkpoints import plan_export
from longrope.factors import Shared

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def own():
    shared = tiny_models.factors("yarn", attention_factor=1.2).spread(2, 2)
    ratios = np.random.default_rng(0).uniform(1, 2, shared.lambdas.shape)
    return shared.replace(lambdas=shared.lambdas * ratios)


def test_readers_get_the_mean_and_load_the_tiers(own, tmp_path):
    model, ids = tiny_models.build(), tokens(1, 70)
    with pytest.warns(UserWarning, match="readers know one set for all"):
        longrope.export(model, tmp_path / "own", own)
    longrope.export(model, tmp_path / "mean", own.mean())
    said, expected = (
        json.loads((tmp_path / name / "config.json").read_text())["rope_parameters"]
        for name in ("own", "mean")
    )
    assert said == expected
    assert "2 layers and 2 heads each" in (tmp_path / "own" / "README.md").read_text()
    again, _ = longrope.load(tmp_path / "own")
    longrope.apply(model, own.ladder())
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_heads_of_another_model_are_refused(own, tmp_path):
    other = own.layer(0)
    other = other.replace(lambdas=np.repeat(other.lambdas, 3, 0), attention_factor=np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"factors: expected lambdas \[2, 2 or 1, R/2\]"):
        longrope.export(tiny_models.build(), tmp_path / "other", other)
    assert not (tmp_path / "other").exists()


def test_readers_get_the_set_that_the_search_began_with(own, tmp_path):
    """From the factors, and from their file; the warning and the card say what it costs."""
    shared = tiny_models.factors("ntk", attention_factor=1.1)
    own.replace(shared=Shared(shared, 2.75, 2.5)).save(tmp_path / "own.json")
    own = longrope.RescaleFactors.load(tmp_path / "own.json")
    cost = r"began with, .* a perplexity of 2\.7500 instead of 2\.5000, 10\.0 % more"
    with pytest.warns(UserWarning, match=f"the export holds the set that their search {cost}"):
        longrope.export(tiny_models.build(), tmp_path / "own", own)
    longrope.export(tiny_models.build(), tmp_path / "shared", shared)
    said, expected = (
        json.loads((tmp_path / name / "config.json").read_text())["rope_parameters"]
        for name in ("own", "shared")
    )
    assert said == expected
    assert re.search(cost, (tmp_path / "own" / "README.md").read_text())
    again, _ = longrope.load(tmp_path / "own")
    last = again.model.rotary_emb.tiers[-1]
    assert last == own
    assert last.shared == own.shared


def test_gguf_holds_the_set_that_the_search_began_with(own, tmp_path):
    gguf = pytest.importorskip("gguf")
    shared = tiny_models.factors("ntk", attention_factor=1.1)
    with pytest.warns(UserWarning, match="the set that their search began with; longrope"):
        longrope.export(
            tiny_models.build(), tmp_path / "g", own.replace(shared=Shared(shared)), format="gguf"
        )
    reader = gguf.GGUFReader(tmp_path / "g" / "model.gguf")
    long = next(t.data for t in reader.tensors if t.name == "rope_factors_long.weight")
    np.testing.assert_allclose(long, shared.lambdas, rtol=1e-6)


def test_the_short_set_is_chosen_alike(own):
    short = own.replace(target_length=tiny_models.ORIGINAL + 2)
    began = tiny_models.factors("ntk").replace(target_length=short.target_length)
    long = tiny_models.factors("yarn")
    model = tiny_models.build()
    for given, expected in (
        (short, short.mean()), (short.replace(shared=Shared(began)), began)
    ):  # fmt: skip
        with pytest.warns(UserWarning, match="a reader changes the factors"):
            plan = plan_export(model, long, given)
        np.testing.assert_array_equal(plan.short.lambdas, expected.lambdas)


def test_what_readers_lose_is_measured(own):
    documents = list(torch.randint(1, 64, (2, 128)))
    with pytest.warns(UserWarning, match="measure_export"):
        measured = longrope.measure_export(tiny_models.build(), own, documents)
    by_name = {row.name: row.overall for row in measured.rows}
    mean = longrope.apply(tiny_models.build(), own.mean())
    assert by_name["**this export**, in any reader"] == pytest.approx(
        longrope.perplexity(mean, documents, length=128, stride=128)
    )
    tiers = longrope.apply(tiny_models.build(), own.ladder())
    assert by_name["longrope, tiers by position"] == pytest.approx(
        longrope.perplexity(tiers, documents, length=128, stride=128)
    )
