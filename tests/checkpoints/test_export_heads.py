"""Exports of factors by layer and head: readers get the mean, `longrope.load` the tiers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import tiny_models
from support.tiny_models import tokens

import longrope

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
