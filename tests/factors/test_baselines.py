"""The closed forms of 2024 to 2026, against transformers and against their formulas by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import tiny_models
from support.tiny_models import rope_arguments
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import longrope
from longrope import RescaleFactors, Tiers, ops
from longrope.factors.baselines import BASELINES
from longrope.factors.rules import closed_forms

#: 8 pairs whose turns in the original window are 512 / 2^i / (2 pi): 81.5, 40.7, 20.4, 10.2, 5.1,
#: 2.5, 1.27, 0.64. So the band of YaRN and MrRoPE is from pair 1 to pair 7: n = 6.
OCTAVES = {"original_length": 512, "target_length": 4096, "rope_theta": 256.0, "rotary_dim": 16}


def transformers_rope(rope_type, theta, head_dim, original, target, **extra):
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim,
        max_position_embeddings=original, **rope_arguments(theta, rope_type=rope_type, **extra),
    )  # fmt: skip
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=target)
    return inv_freq.double().numpy(), factor


@pytest.mark.parametrize(
    "theta, head_dim, original, target, low, high",
    [(500000.0, 128, 8192, 65536, 1.0, 4.0), (10000.0, 64, 256, 2048, 1.0, 4.0),
     (500000.0, 64, 8192, 262144, 2.0, 16.0)],
)  # fmt: skip
def test_llama3_is_transformers(theta, head_dim, original, target, low, high):
    expected, factor = transformers_rope(
        "llama3", theta, head_dim, original, target, factor=target / original,
        low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original,
    )  # fmt: skip
    made = RescaleFactors.llama3(
        original_length=original, target_length=target, rope_theta=theta, rotary_dim=head_dim,
        low_freq_factor=low, high_freq_factor=high,
    )  # fmt: skip
    np.testing.assert_allclose(made.inv_freq(), expected, rtol=2e-6)
    assert made.attention_factor == factor == 1.0
    assert len(np.unique(made.lambdas)) > 4  # the part in between is there


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_dynamic_ntk_is_transformers_at_the_target(factor):
    expected, _ = transformers_rope("dynamic", 10000.0, 64, 256, 2048, factor=factor)
    sizes = {"original_length": 256, "target_length": 2048, "rotary_dim": 64}
    made = RescaleFactors.dynamic_ntk(**sizes, factor=factor)
    np.testing.assert_allclose(made.inv_freq(), expected, rtol=2e-6)
    assert (factor == 8.0) == (made == RescaleFactors.dynamic_ntk(**sizes))
    assert (factor == 1.0) == (made == RescaleFactors.ntk(**sizes))


def test_mrrope_by_hand():
    # s = 8 = 2^3, so log2 lambda is 3 t / 6, and 3 t (t + 1) / 42.
    uni = [0, 0, 0.5, 1, 1.5, 2, 2.5, 3]
    pro = [0, 0, 1 / 7, 3 / 7, 6 / 7, 10 / 7, 15 / 7, 3]
    for variant, expected in (("uni", uni), ("pro", pro)):
        made = RescaleFactors.mrrope(**OCTAVES, variant=variant)
        np.testing.assert_allclose(np.log2(made.lambdas), expected, atol=1e-12)
        assert made.attention_factor == pytest.approx(0.1 * math.log(8) + 1)
    assert RescaleFactors.mrrope(**OCTAVES) == made  # "pro" is the default


def test_mrrope_pro_rises_late():
    sizes = {"original_length": 8192, "target_length": 65536, "rope_theta": 5e5}
    pro, uni = (RescaleFactors.mrrope(**sizes, variant=v).lambdas for v in ("pro", "uni"))
    band = (uni > 1) & (uni < 8)
    assert band.sum() > 10
    assert np.all(pro[band] < uni[band]) and np.all(pro[~band] == uni[~band])
    assert np.all(np.diff(np.log(pro[band]), 2) > 0)


def test_cope_by_hand():
    # Periods longer than 512: the last pair alone (0.64 turns), and a taper of one is its start.
    plain = RescaleFactors.none(**OCTAVES)
    assert plain.cope() == plain
    # (1 + cos(0, 60, 120, 180 degrees)) / 2 = 1, 3/4, 1/4, 0.
    found = plain.cope(pairs=4)
    np.testing.assert_allclose(found.lambdas, [1, 1, 1, 1, 1, 4 / 3, 4, math.inf])
    assert found.inv_freq()[-1] == 0
    yarn = RescaleFactors.yarn(**OCTAVES)
    np.testing.assert_allclose(yarn.cope(4).lambdas[:5], yarn.lambdas[:5])
    np.testing.assert_allclose(yarn.cope(4).lambdas[5:7], yarn.lambdas[5:7] * [4 / 3, 4])
    assert RescaleFactors.cope(yarn, 4).attention_factor == yarn.attention_factor


def test_cope_tapers_the_pairs_that_never_finish_a_turn():
    made = RescaleFactors.none(original_length=8192, rope_theta=500000.0).cope()
    # 2 pi 500000^(i / 64) > 8192 from i = 34.98 on.
    assert np.all(made.lambdas[:36] == 1) and np.all(made.lambdas[36:] > 1)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_by_name(name):
    made = BASELINES[name](**OCTAVES)
    assert {field: getattr(made, field) for field in OCTAVES} == OCTAVES
    assert np.all(made.lambdas >= 1)
    forms = closed_forms(8, *(OCTAVES[k] for k in ("original_length", "rope_theta", "rotary_dim")))
    assert set(forms) == set(BASELINES)  # what a search begins with
    np.testing.assert_array_equal(made.lambdas, forms[name])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RescaleFactors.mrrope(**OCTAVES, variant="x"), "variant: expected one of 'pro'"),
        (lambda: RescaleFactors.llama3(**OCTAVES, high_freq_factor=1.0), "high_freq_factor: "),
        (lambda: RescaleFactors.dynamic_ntk(**OCTAVES, factor=0.5), "factor: expected at least 1"),
        (lambda: RescaleFactors.yarn(**OCTAVES).cope(9), "pairs: expected at most the 8 pairs"),
        (lambda: RescaleFactors.yarn(**OCTAVES).cope(0), "pairs: expected an integer of at least"),
        (lambda: RescaleFactors.none(**OCTAVES).cope(4).ladder(), "lambdas: expected finite"),
    ],
)
def test_refusals_are_one_sentence(make, message):
    with pytest.raises(ValueError) as refused:
        make()
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def stopped():
    """Return factors for the tiny models whose slowest pairs are tapered, the last to a stop."""
    return tiny_models.factors("yarn").cope(pairs=3)


def test_a_stopped_pair_in_files_and_products(tmp_path):
    factors = stopped()
    factors.save(tmp_path / "one.json")
    assert RescaleFactors.load(tmp_path / "one.json") == factors
    tiers = Tiers([tiny_models.factors("none", target=32), factors])
    tiers.save(tmp_path / "tiers.json")
    assert Tiers.load(tmp_path / "tiers.json") == tiers
    assert np.isinf((factors * tiny_models.factors("pi")).lambdas[-1])


def test_a_stopped_pair_turns_by_no_kernel():
    inv_freq = torch.from_numpy(stopped().inv_freq()).requires_grad_()
    q, k = torch.randn(2, 1, 2, 8, 16)
    positions = torch.arange(8) * 1000
    turned, _ = ops.rope(q, k, positions, inv_freq)
    for channel in (7, 15):  # the last pair of a head of 16
        torch.testing.assert_close(turned[..., channel], q[..., channel], rtol=0, atol=0)
    expected, _ = ops.reference.rope(q, k, positions, inv_freq)
    torch.testing.assert_close(turned, expected)
    assert torch.isfinite(torch.autograd.grad(turned.sum(), inv_freq)[0]).all()


@pytest.mark.parametrize("as_tiers", [False, True])
def test_a_stopped_pair_in_a_model_is_the_models_own_with_those_frequencies(as_tiers):
    model, plain, factors = tiny_models.build(), tiny_models.build(), stopped()
    ids = tiny_models.tokens(1)
    rotary = plain.model.rotary_emb
    rotary.inv_freq.copy_(torch.from_numpy(factors.inv_freq()))
    rotary.attention_scaling = factors.attention_factor
    with torch.no_grad():
        expected = plain(ids).logits
        tiers = Tiers([factors.replace(target_length=32), factors])
        longrope.apply(model, tiers if as_tiers else factors)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_an_export_carries_a_huge_number(tmp_path):
    model, factors = tiny_models.build(), stopped()
    longrope.export(model, tmp_path / "out", factors)
    from transformers import AutoConfig, AutoModelForCausalLM

    from longrope.patching.settings import rope_parameters

    named = rope_parameters(AutoConfig.from_pretrained(tmp_path / "out"))
    assert named["long_factor"][-1] == 1e30
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tiny_models.tokens(1)
    longrope.apply(model, factors)
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
