"""RescaleFactors: baselines against transformers, validation, product, files."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_models import rope_arguments
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longrope import RescaleFactors, su_attention_factor, yarn_attention_factor

# (rope_theta, head_dim, partial rotary factor, original, target)
CONFIGURATIONS = [
    (10000.0, 128, 1.0, 4096, 32768),
    (10000.0, 64, 1.0, 256, 2048),
    (10000.0, 96, 1.0, 4096, 131072),
    (500000.0, 128, 1.0, 8192, 262144),
    (500000.0, 64, 1.0, 2048, 5000),
    (10000.0, 96, 0.25, 2048, 16384),
    (10000.0, 80, 0.4, 2048, 8192),
]


def transformers_inv_freq(rope_type, theta, head_dim, partial, original, target, **extra):
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=original,
        **rope_arguments(theta, partial, rope_type=rope_type, **extra),
    )
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=target)
    return inv_freq.double().numpy(), attention_factor


def ours(theta, head_dim, partial, original, target):
    return {
        "original_length": original,
        "target_length": target,
        "rope_theta": theta,
        "rotary_dim": int(head_dim * partial),
    }


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=str)
def test_pi_is_transformers_linear(case):
    expected, _ = transformers_inv_freq("linear", *case, factor=case[4] / case[3])
    factors = RescaleFactors.pi(**ours(*case))
    np.testing.assert_allclose(factors.inv_freq(), expected, rtol=1e-6)
    assert factors.attention_factor == 1.0


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=str)
def test_ntk_is_transformers_dynamic(case):
    expected, _ = transformers_inv_freq("dynamic", *case, factor=1.0)
    factors = RescaleFactors.ntk(**ours(*case))
    np.testing.assert_allclose(factors.inv_freq(), expected, rtol=1e-6)
    pairs, dim = np.arange(factors.rotary_dim // 2), factors.rotary_dim
    np.testing.assert_allclose(factors.lambdas, factors.ratio ** (2 * pairs / (dim - 2)))
    assert factors.attention_factor == 1.0


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("case", CONFIGURATIONS, ids=str)
def test_yarn_is_transformers_yarn(case, truncate):
    expected, attention_factor = transformers_inv_freq(
        "yarn",
        *case,
        factor=case[4] / case[3],
        original_max_position_embeddings=case[3],
        truncate=truncate,
    )
    factors = RescaleFactors.yarn(**ours(*case), truncate=truncate)
    np.testing.assert_allclose(factors.inv_freq(), expected, rtol=1e-6)
    assert factors.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_yarn_truncate_makes_a_difference():
    kinds = [RescaleFactors.yarn(**ours(*CONFIGURATIONS[1]), truncate=t) for t in (True, False)]
    assert not np.allclose(kinds[0].lambdas, kinds[1].lambdas, rtol=1e-3)


def test_none_changes_nothing():
    factors = RescaleFactors.none(original_length=256, rotary_dim=64, rope_theta=500000.0)
    assert factors.target_length == 256
    np.testing.assert_array_equal(factors.inv_freq(), factors.base_inv_freq())
    np.testing.assert_allclose(factors.base_inv_freq()[[0, 16]], [1.0, 500000.0**-0.5])


@pytest.mark.parametrize("kind", ["none", "pi", "ntk", "yarn"])
def test_ratio_one_is_no_change(kind):
    factors = getattr(RescaleFactors, kind)(original_length=512, target_length=512, rotary_dim=2)
    np.testing.assert_array_equal(factors.lambdas, [1.0])
    assert factors.attention_factor == 1.0


@pytest.mark.parametrize(
    "ratio, value", [(2, 1.04083), (32, 1.19024), (64, 1.22474), (512, 1.32288), (1, 1), (0.5, 1)]
)
def test_su_attention_factor(ratio, value):
    assert su_attention_factor(ratio, 4096) == pytest.approx(value, abs=5e-6)


def test_yarn_attention_factor():
    assert yarn_attention_factor(math.e) == pytest.approx(1.1)
    assert yarn_attention_factor(0.5) == yarn_attention_factor(1.0) == 1.0


# --- validation -----------------------------------------------------------------------------------

GOOD = {"lambdas": [1.0, 2.0], "rotary_dim": 4}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lambdas": [1.0] * 32, "rotary_dim": 128},
         "lambdas: expected 64 positive values (rotary_dim / 2), got 32"),
        ({"lambdas": [1.0, 0.0]}, "got 0.0 at index 1"),
        ({"lambdas": [-1.0, 2.0]}, "got -1.0 at index 0"),
        ({"lambdas": [1.0, -math.inf]}, "got -inf at index 1"),
        ({"lambdas": [math.nan, 1.0]}, "got nan at index 0"),
        ({"lambdas": [[1.0], [2.0]]}, "got shape [2, 1]"),
        ({"lambdas": ["a", "b"]}, "lambdas: expected 2 positive values"),
        ({"lambdas": None}, "lambdas: expected 2 positive values"),
        ({"start_tokens": -1}, "start_tokens: expected an integer of at least 0, got -1"),
        ({"start_tokens": 1.5}, "start_tokens: expected an integer of at least 0, got 1.5"),
        ({"start_tokens": True}, "start_tokens: expected an integer"),
        ({"attention_factor": 0}, "attention_factor: expected a finite number above 0, got 0"),
        ({"attention_factor": math.nan}, "attention_factor: expected a finite number above 0"),
        ({"attention_factor": "su"}, "attention_factor: expected a finite number above 0"),
        ({"original_length": 0}, "original_length: expected an integer of at least 1, got 0"),
        ({"target_length": 2.5}, "target_length: expected an integer of at least 1, got 2.5"),
        ({"rope_theta": 1.0}, "rope_theta: expected a finite number above 1, got 1.0"),
        ({"rotary_dim": 5}, "rotary_dim: expected an even number, got 5"),
        ({"rotary_dim": 0}, "rotary_dim: expected an integer of at least 2, got 0"),
    ],
)  # fmt: skip
def test_validation_is_one_sentence(change, message):
    with pytest.raises(ValueError) as caught:
        RescaleFactors(**(GOOD | change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pi", "ntk", "yarn"])
def test_baselines_refuse_a_shorter_target(kind):
    with pytest.raises(ValueError, match=r"target_length: expected at least .* \(4096\), got 512"):
        getattr(RescaleFactors, kind)(original_length=4096, target_length=512)


def test_neither_order_nor_one_binds_the_type():
    assert RescaleFactors([2.0, 0.5], rotary_dim=4).lambdas.tolist() == [2.0, 0.5]


def test_is_immutable_hashable_and_copies():
    given_array = np.array([1.0, 2.0])
    factors = RescaleFactors(given_array, rotary_dim=4)
    given_array[0] = 9.0
    assert factors.lambdas[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        factors.lambdas[0] = 3.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        factors.start_tokens = 3
    same = RescaleFactors([1.0, 2.0], rotary_dim=4)
    assert factors == same and hash(factors) == hash(same) and len({factors, same}) == 1
    assert factors != factors.replace(start_tokens=4)
    assert factors != factors.replace(lambdas=[1.0, 2.5])
    assert factors != "factors"
    for twin in (copy.deepcopy(factors), pickle.loads(pickle.dumps(factors))):
        assert twin == factors and not twin.lambdas.flags.writeable
    with pytest.raises(ValueError, match="start_tokens"):
        factors.replace(start_tokens=-2)


def test_accepts_torch_and_numpy_scalars():
    factors = RescaleFactors(
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
        np.int64(4),
        np.float32(1.5),
        rotary_dim=np.int32(4),
    )
    assert factors.lambdas.dtype == np.float64 and factors.inv_freq().dtype == np.float64
    assert type(factors.start_tokens) is int and type(factors.attention_factor) is float


# --- product --------------------------------------------------------------------------------------

# A slow machine is no error.
few = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
lengths = st.integers(1, 2**20)  # three of them multiply to less than 2^63, the most there is
positive = st.floats(1e-3, 1e3)


def factor_sets(original=lengths, target=lengths):
    return st.builds(
        RescaleFactors,
        st.lists(positive, min_size=4, max_size=4),
        st.integers(0, 256),
        positive,
        original,
        target,
        rotary_dim=st.just(8),
    )


def test_product_of_two_stages():
    first = RescaleFactors([1.0, 2.0], 4, 1.1, 4096, 262144, rotary_dim=4)
    second = RescaleFactors([1.5, 3.0], 8, 1.2, 262144, 2097152, rotary_dim=4)
    both = first * second
    assert both.lambdas.tolist() == [1.5, 6.0]
    assert both.attention_factor == pytest.approx(1.32)
    assert both.start_tokens == 8
    assert (both.original_length, both.target_length, both.ratio) == (4096, 2097152, 512)
    # An 8x set found at another length composes by its ratio.
    assert (first * second.replace(original_length=100, target_length=800)).ratio == 512


@few
@given(factor_sets(), factor_sets(), factor_sets())
def test_product_is_associative(f, g, h):
    left, right = (f * g) * h, f * (g * h)
    np.testing.assert_allclose(left.lambdas, right.lambdas, rtol=1e-14)
    assert left.attention_factor == pytest.approx(right.attention_factor, rel=1e-14)
    assert left.original_length == right.original_length == f.original_length
    assert left.start_tokens == right.start_tokens == h.start_tokens


@few
@given(st.lists(lengths, min_size=4, max_size=4))
def test_lengths_of_a_chain_are_exact(chain):
    f, g, h = (RescaleFactors([1.0], 0, 1.0, a, b, rotary_dim=2)
               for a, b in itertools.pairwise(chain))  # fmt: skip
    for product in ((f * g) * h, f * (g * h)):
        assert (product.original_length, product.target_length) == (chain[0], chain[3])


def test_none_is_neutral():
    f = RescaleFactors.yarn(original_length=256, target_length=2048, rotary_dim=64)
    assert f * RescaleFactors.none(original_length=2048, rotary_dim=64) == f


def test_product_refuses_other_models():
    f = RescaleFactors([1.0, 2.0], rotary_dim=4)
    with pytest.raises(ValueError, match=r"rope_theta: .* got 10000.0 and 500000.0"):
        _ = f * f.replace(rope_theta=500000.0)
    with pytest.raises(ValueError, match=r"rotary_dim: .* got 4 and 2"):
        _ = f * RescaleFactors([1.0], rotary_dim=2)
    with pytest.raises(TypeError):
        _ = f * 2.0


# --- files ----------------------------------------------------------------------------------------


@few
@given(factor_sets())
def test_json_returns_every_bit(tmp_path_factory, factors):
    path = tmp_path_factory.mktemp("factors") / "factors.json"
    factors.save(path)
    loaded = RescaleFactors.load(path)
    assert loaded == factors
    assert loaded.lambdas.tobytes() == factors.lambdas.tobytes()


def test_save_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "factors.json"
    RescaleFactors([1.0], rotary_dim=2).save(path)
    RescaleFactors([2.0], rotary_dim=2).save(str(path))
    assert RescaleFactors.load(path).lambdas.tolist() == [2.0]
    assert [p.name for p in tmp_path.iterdir()] == ["factors.json"]


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "factors.json"
    RescaleFactors([1.0], rotary_dim=2).save(path)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        RescaleFactors([2.0], rotary_dim=2).save(path)
    assert RescaleFactors.load(path).lambdas.tolist() == [1.0]
    assert [p.name for p in tmp_path.iterdir()] == ["factors.json"]


def test_file_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot read .*missing.json: No such file"):
        RescaleFactors.load(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError, match=r"cannot write .*absent"):
        RescaleFactors([1.0], rotary_dim=2).save(tmp_path / "absent" / "factors.json")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"lambdas": [1.0', "expected JSON, got a file broken at"),
        ('{"lambdas": [1.0]}', 'expected a JSON file of format "longrope-factors"'),
        ('{"format": "longrope-factors", "version": 99}', "expected format version 1, got 99"),
        ("", "got an empty file"),
        ("# only a comment\n\n", "got an empty file"),
        ("1.0\ntwo\n", "expected numbers on line 2, got 'two'"),
        ("1.0,2.0\n1.0,2.5\n", "expected the same factors in every layer (row), rows 1 and 2"),
        ("1.0,2.0\n1.0\n", "expected the same factors in every layer (row), rows 1 and 2"),
        ("1.0\n-2.0\n", "lambdas: expected 2 positive values (rotary_dim / 2), got -2.0"),
        ("1.0\nnan\n", "got nan at index 1"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    path = tmp_path / "factors"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        RescaleFactors.load(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("wrong", [{"extra": 1}, {"lambdas": "1, 2"}, {"target_length": None}])
def test_json_with_wrong_fields(tmp_path, wrong):
    path = tmp_path / "factors.json"
    RescaleFactors([1.0, 2.0], rotary_dim=4).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RescaleFactors.load(path)


def test_binary_file(tmp_path):
    (tmp_path / "factors.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="expected a JSON or CSV text file, got binary data"):
        RescaleFactors.load(tmp_path / "factors.bin")


@pytest.mark.parametrize(
    "text",
    ["1.0\n1.5\n4.25\n", "1.0,1.5,4.25\n" * 3, "1.0, 1.5, 4.25,\n", "1.0 1.5 4.25\n\n"],
    ids=["one a line", "layers", "trailing comma", "spaces"],
)
def test_csv(tmp_path, text):
    path = tmp_path / "factors.csv"
    path.write_text(text)
    assert RescaleFactors.load(path) == RescaleFactors([1.0, 1.5, 4.25], rotary_dim=6)
    settings = {"original_length": 512, "target_length": 1024, "rope_theta": 5e5,
                "start_tokens": 4, "attention_factor": 1.25}  # fmt: skip
    expected = RescaleFactors([1.0, 1.5, 4.25], rotary_dim=6, **settings)
    assert RescaleFactors.load(path, **settings) == expected
    with pytest.raises(ValueError, match="expected 4 positive values"):
        RescaleFactors.load(path, rotary_dim=8)


def test_json_takes_no_settings(tmp_path):
    RescaleFactors([1.0], rotary_dim=2).save(tmp_path / "f.json")
    with pytest.raises(ValueError, match="rope_theta: expected no settings beside"):
        RescaleFactors.load(tmp_path / "f.json", rope_theta=5e5)


def test_an_infinite_lambda_stops_its_pair(tmp_path):
    factors = RescaleFactors([1.0, math.inf], rotary_dim=4)
    assert factors.inv_freq()[1] == 0
    factors.save(tmp_path / "factors.json")
    assert '"inf"' in (tmp_path / "factors.json").read_text()
    assert RescaleFactors.load(tmp_path / "factors.json") == factors
