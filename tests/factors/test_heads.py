"""RescaleFactors by layer and head: shapes, means, products, files, tiers."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from longrope import RescaleFactors, Tiers

SIZES = {"original_length": 256, "target_length": 2048, "rotary_dim": 16}
SHARED = RescaleFactors.yarn(**SIZES)


def own(layers=3, heads=2, seed=0):
    random = np.random.default_rng(seed)
    return RescaleFactors(
        random.uniform(1, 8, (layers, heads, 8)),
        attention_factor=random.uniform(1, 1.3, (layers, heads)), start_tokens=4, **SIZES,
    )  # fmt: skip


def test_shapes():
    made = own()
    assert made.per_head
    assert made.heads == (3, 2)
    assert not SHARED.per_head
    assert SHARED.heads is None
    np.testing.assert_array_equal(made.inv_freq(), made.base_inv_freq() / made.lambdas)
    for given in (torch.from_numpy(made.lambdas.copy()), made.lambdas.tolist()):
        assert made.replace(lambdas=given) == made
    one_number = made.replace(attention_factor=1.25)
    np.testing.assert_array_equal(one_number.attention_factor, np.full((3, 2), 1.25))
    with pytest.raises(ValueError, match="read-only"):
        made.attention_factor[0, 0] = 2


def test_the_mean_is_nearest_in_log_lambda():
    made = own()
    mean = made.mean()

    def distance(factors):
        return np.square(np.log(made.lambdas / factors.lambdas)).sum()

    for change in (0.99, 1.01):
        assert distance(mean) < distance(mean.replace(lambdas=mean.lambdas * change))
    assert np.log(mean.attention_factor) == pytest.approx(np.log(made.attention_factor).mean())
    np.testing.assert_allclose(SHARED.spread(3, 2).mean().lambdas, SHARED.lambdas)
    assert SHARED.mean() is SHARED
    assert mean.start_tokens == 4


def test_one_layer():
    made = own()
    np.testing.assert_array_equal(made.layer(1).lambdas, made.lambdas[1:2])
    np.testing.assert_array_equal(made.layer(1).attention_factor, made.attention_factor[1:2])
    by_layer = own(heads=1).layer(2)
    assert by_layer.lambdas.shape == (8,)
    assert isinstance(by_layer.attention_factor, float)
    assert SHARED.layer(5) is SHARED


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("other", [SHARED, own(heads=1), own(seed=1)], ids=["shared", "1", "2"])
def test_stages_multiply(other, swap):
    first, second = (other, own()) if swap else (own(), other)
    product = first * second
    np.testing.assert_allclose(product.lambdas, first.lambdas * second.lambdas)
    np.testing.assert_allclose(
        product.attention_factor, first.attention_factor * second.attention_factor
    )
    assert product.heads == (3, 2)
    assert product.ratio == 64


def test_stages_of_other_layers_do_not():
    with pytest.raises(ValueError, match=r"^factors: expected those of 3 layers and 3 or 1 heads"):
        own() * own(heads=3)


def test_equality_and_copies():
    made = own()
    assert made == own()
    assert hash(made) == hash(own())
    assert made != own(seed=1)
    assert made != made.replace(attention_factor=1.0)
    turned = RescaleFactors(made.lambdas.reshape(2, 3, 8), start_tokens=4, **SIZES)
    assert turned != made.replace(attention_factor=1.0)
    assert pickle.loads(pickle.dumps(made)) == made


def test_files(tmp_path):
    made = own()
    stopped = made.replace(lambdas=np.where(made.lambdas > 6, np.inf, made.lambdas))
    for factors in (made, stopped):
        factors.save(tmp_path / "factors.json")
        assert RescaleFactors.load(tmp_path / "factors.json") == factors
    tiers = Tiers([RescaleFactors.none(original_length=256, rotary_dim=16), made])
    tiers.save(tmp_path / "tiers.json")
    assert Tiers.load(tmp_path / "tiers.json") == tiers
    content = json.loads((tmp_path / "factors.json").read_text())
    content["lambdas"][0][0][0] = "many"
    (tmp_path / "factors.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lambdas: expected a list of numbers"):
        RescaleFactors.load(tmp_path / "factors.json")


def test_a_ladder():
    made = own()
    ladder = made.ladder()
    assert ladder.limits == (256, 512, 1024, 2048)
    np.testing.assert_allclose(ladder[1].lambdas, made.lambdas ** (1 / 3))
    np.testing.assert_allclose(ladder[2].attention_factor, made.attention_factor ** (2 / 3))
    assert "to" in repr(ladder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lambdas": np.ones((2, 8))}, r"lambdas: expected 8 positive values .* shape \[2, 8\]"),
        ({"lambdas": np.ones((2, 0, 8))}, "lambdas: expected 8 positive values"),
        ({"lambdas": np.zeros((2, 1, 8))}, r"lambdas: .* got 0.0 at index \[0, 0, 0\]"),
        ({"attention_factor": np.ones((3, 2))}, "attention_factor: expected a number"),
        (
            {"lambdas": np.ones((2, 2, 8)), "attention_factor": np.ones((2, 1))},
            r"attention_factor: expected positive numbers \[2, 2\], .* got shape \[2, 1\]",
        ),
        (
            {"lambdas": np.ones((1, 2, 8)), "attention_factor": [[1.0, -1.0]]},
            "attention_factor: expected positive numbers .* got -1.0",
        ),
        ({"lambdas": np.ones((1, 1, 8)), "attention_factor": "x"}, "attention_factor: expected"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SHARED.replace(**fields)
