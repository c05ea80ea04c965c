"""Models of no known family: tried on a tiny random model of their class, and named as untested."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support import families
from support.families import SMALL, VERSION_5
from support.tiny_models import ORIGINAL, TARGET, rope_arguments, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import longrope
from longrope.patching import trial
from longrope.patching.attention import has_kernel_attention

pytestmark = pytest.mark.usefixtures("one_thread")

UNTESTED = "is in none of the families that longrope is tested with"


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    from longrope.patching import families

    monkeypatch.setattr(families, "_TRIED", {})


def build(model_type, kind=AutoModelForCausalLM, **extra):
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **(SMALL | rope_arguments() | extra))
    return kind.from_config(config).eval()


def yarn():
    return longrope.RescaleFactors.yarn(**families.sizes("llama"))


@torch.no_grad()
def outputs(model, ids):
    return model(ids, use_cache=False)[0]


@pytest.mark.parametrize("model_type", ["starcoder2", "seed_oss", "arcee"])
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
def test_one_of_the_usual_shape_is_named_and_works(model_type, kind):
    extra = {"sliding_window": None} if model_type == "starcoder2" else {}
    model, ids = build(model_type, kind, **extra), tokens(2, 90)
    window = outputs(model, ids[:, :ORIGINAL])
    with pytest.warns(UserWarning, match=f'"{model_type}" {UNTESTED}'):
        longrope.apply(model, yarn().ladder())
    assert torch.equal(outputs(model, ids[:, :ORIGINAL]), window)
    scaling = {"rope_type": "yarn", "factor": TARGET / ORIGINAL,
               "original_max_position_embeddings": ORIGINAL}  # fmt: skip
    own = build(model_type, kind, **extra, **rope_arguments(**scaling))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        longrope.apply(model, yarn())
    torch.testing.assert_close(outputs(model, ids), outputs(own, ids), rtol=1e-3, atol=1e-3)


def test_it_is_tried_once_and_leaves_no_trace(monkeypatch):
    calls, inner = [], trial.try_model
    monkeypatch.setattr(trial, "try_model", lambda model: calls.append(1) or inner(model))
    model, ids = build("olmo"), tokens(2, 60)
    before, config = outputs(model, ids), copy.deepcopy(model.config)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=UNTESTED):
        longrope.apply(model, yarn())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert model.config.to_dict() == config.to_dict()
    longrope.apply(build("olmo"), yarn())
    longrope.remove(model)
    assert torch.equal(outputs(model, ids), before)
    assert calls == [1]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("cohere", "the factors of the model as loaded change its outputs"),  # neighbours paired
        ("glm4", "the factors of the model as loaded change its outputs"),
        ("phimoe", "factors do other than the same frequencies|TypeError"),
    ],
)
def test_one_that_fails_is_refused_with_the_reason(model_type, reason):
    extra = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "phimoe" else {}
    model = build(model_type, **extra)
    with pytest.raises(ValueError, match=f'works like them, got "{model_type}": .*({reason})'):
        longrope.apply(model, yarn())
    assert not has_kernel_attention(model)
    ids = list(tokens(2, 60))
    assert longrope.perplexity(model, ids, length=60, stride=60) > 1  # as transformers has it


@pytest.mark.skipif(not VERSION_5, reason="Ministral 3 is younger than transformers 4.57")
def test_queries_scaled_by_position_have_no_tiers_by_position():
    rope = rope_arguments(original_max_position_embeddings=ORIGINAL, llama_4_scaling_beta=0.1)
    model, ids = build("ministral3", **rope), tokens(2, 60)
    plain = outputs(model, ids)
    with pytest.warns(UserWarning, match='but for tiers by position, which only tiers="row" gives'):
        longrope.apply(model, yarn())
    assert not torch.allclose(outputs(model, ids), plain)
    with pytest.raises(ValueError, match="expected a family whose attention tiers by position"):
        longrope.apply(model, yarn().ladder())
    with pytest.raises(ValueError, match="expected a family whose attention tiers by position"):
        longrope.search(model, list(tokens(2, TARGET)), target_length=TARGET, ladder=True)
    longrope.apply(model, yarn().ladder(), tiers="row")


def test_a_trial_that_was_interrupted_is_made_again(monkeypatch):
    def interrupted(model):
        raise KeyboardInterrupt

    model = build("cohere")
    with monkeypatch.context() as patched:
        patched.setattr(trial, "try_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            longrope.apply(model, yarn())
    with pytest.raises(ValueError, match='works like them, got "cohere"'):
        longrope.apply(model, yarn())


def test_a_configuration_alone_cannot_be_tried():
    from longrope.patching.families import family_of

    with pytest.raises(ValueError, match=r'or one that works like them, got "olmo"$'):
        family_of(build("olmo").config)
