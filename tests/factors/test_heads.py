"""RescaleFactors by layer and head: shapes, means, products, files, tiers."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from longrope import RescaleFactors, Tiers
from longrope.factors import Shared

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
    for factors in (made, own(heads=1)):
        assert factors.layer(-1) == factors.layer(len(factors.lambdas) - 1)
        with pytest.raises(IndexError):
            factors.layer(len(factors.lambdas))


def test_cope_tapers_every_head():
    made = own()
    tapered = made.cope(3)
    for layer, head in np.ndindex(made.heads):
        one = SHARED.replace(lambdas=made.lambdas[layer, head]).cope(3)
        np.testing.assert_array_equal(tapered.lambdas[layer, head], one.lambdas)


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


def test_the_set_that_a_search_began_with(tmp_path):
    """It stands beside the factors, in files too, and goes where they change."""
    plain = own()
    beside = Shared(SHARED, 2.75, 2.5)
    made = plain.replace(shared=beside)
    assert made == plain
    assert hash(made) == hash(plain)
    assert made.one_set() is SHARED
    assert plain.one_set() == plain.mean()
    assert SHARED.one_set() is SHARED
    assert beside.cost.endswith("a perplexity of 2.7500 instead of 2.5000, 10.0 % more")
    assert Shared(SHARED).cost == ""
    tiers = Tiers([RescaleFactors.none(original_length=256, rotary_dim=16), made])
    made.save(tmp_path / "factors.json")
    tiers.save(tmp_path / "tiers.json")
    for again in (
        RescaleFactors.load(tmp_path / "factors.json"),
        Tiers.load(tmp_path / "tiers.json")[-1],
        pickle.loads(pickle.dumps(made)),
    ):
        assert again == made
        assert again.shared == beside
    for changed in (made.mean(), made.layer(0), made.spread(3, 2), made.replace(start_tokens=1)):
        assert changed.shared is None
    assert made.ladder()[1].shared is None


def test_products_know_the_product_of_the_sets():
    """Where both know one: its perplexity was never measured."""
    made, other = own().replace(shared=Shared(SHARED, 2.75, 2.5)), own(seed=1)
    assert (made * SHARED).shared == Shared(SHARED * SHARED)
    assert (SHARED * made).shared == Shared(SHARED * SHARED)
    both = made * other.replace(shared=Shared(SHARED))
    assert both.one_set() == SHARED * SHARED
    assert (made * other).shared is None and (SHARED * SHARED).shared is None


@pytest.mark.parametrize(
    ("factors", "shared", "message"),
    [
        (SHARED, Shared(SHARED), "shared: expected None beside lambdas for all layers and heads"),
        (own(), SHARED, "shared: expected a Shared or None, got RescaleFactors"),
        (own(), Shared(SHARED.replace(target_length=512)), "shared: expected target_length 2048"),
    ],
)
def test_a_set_that_does_not_belong(factors, shared, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        factors.replace(shared=shared)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factors": own()}, "shared: expected factors for all layers and heads alike, got those"),
        ({"factors": None}, "shared: expected factors for all layers and heads alike, got None"),
        ({"factors": SHARED, "perplexity": "2"}, "shared: perplexity: expected a finite number"),
        ({"factors": SHARED, "own_perplexity": float("nan")}, "shared: own_perplexity: expected"),
    ],
)
def test_no_set_of_that_kind(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Shared(**fields)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (3, 'expected an object "shared" of factors, own_perplexity, perplexity'),
        ({"factors": 1}, 'expected an object "shared" of factors'),
        ({"factors": {}, "perplexity": 2, "own_perplexity": 2}, "expected the fields of rescale"),
        ({"factors": None, "perplexity": 2, "own_perplexity": 2}, "expected the fields of rescale"),
        (
            {
                "factors": SHARED.as_fields() | {"shared": None},
                "perplexity": 2,
                "own_perplexity": 2,
            },
            "unknown: shared",
        ),
        ({"factors": SHARED.as_fields(), "perplexity": "2", "own_perplexity": 2}, "shared: perpl"),
        ({"factors": own().as_fields(), "perplexity": 2, "own_perplexity": 2}, "shared: expected"),
    ],
)
def test_a_hostile_set_in_a_file_gets_one_sentence(tmp_path, shared, message):
    file = tmp_path / "factors.json"
    own().save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shared": shared}))
    for load in (RescaleFactors.load, Tiers.load):
        with pytest.raises(ValueError, match=message) as caught:
            load(file)
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.csv", "x.CSV"])
def test_no_json_under_the_name_of_a_csv_file(tmp_path, name):
    tiers = Tiers([RescaleFactors.none(original_length=256, rotary_dim=16), own()])
    for made in (own(), SHARED, tiers):
        with pytest.raises(ValueError, match=r"^path: expected the name of a JSON file, got "):
            made.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


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
        *(
            ({"lambdas": np.ones((1, 2, 8)), "attention_factor": value}, f"attention_factor: {end}")
            for value, end in (
                ([["1.5", 1.0]], r".* got '1.5'$"),
                ([[True, 1.0]], ".* got True$"),
                (True, ".* got True$"),
                (np.ones((1, 2), bool), ".* got True$"),
                (torch.ones(1, 2, dtype=torch.bool), ".* got True$"),
                ([[1.0, float("nan")]], ".* got nan$"),
                ([[1.0, None]], ".* got list that is no array$"),
                (np.ones((1, 2), complex), ".* got ndarray that is no array$"),
                ([[10**400, 1.0]], ".* overflows float64$"),
            )
        ),
        ({"lambdas": ["1"] * 8}, "lambdas: .* got '1'$"),
        ({"lambdas": [True] * 8}, "lambdas: .* got True$"),
        ({"lambdas": np.array(["1"] * 8)}, "lambdas: .* got '1'$"),
        ({"lambdas": [[["1"] * 8]]}, "lambdas: .* got '1'$"),
        ({"lambdas": [float("nan")] * 8}, "lambdas: .* got nan at index 0$"),
        ({"target_length": "2048"}, "target_length: expected an integer"),
        ({"target_length": True}, "target_length: expected an integer"),
        ({"original_length": 2.0}, "original_length: expected an integer"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SHARED.replace(**fields)
