"""Numbers that no state dict holds, through what moves, copies and empties a model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support import families
from support.families import VERSION_5
from support.tiny_models import tokens
from transformers import AutoModelForCausalLM

import longrope

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("one set", "start tokens", "tiers", "tiers by row")


@pytest.fixture(params=["llama", "olmo3"] if VERSION_5 else ["llama"])
def model_type(request):
    return request.param


@pytest.fixture(params=KINDS)
def applied(request, model_type):
    """Return a function that applies factors to a model of the type."""
    yarn = longrope.RescaleFactors.yarn(**families.sizes(model_type))
    if request.param == "start tokens":
        yarn = yarn.replace(start_tokens=4)
    sets = yarn.ladder() if "tiers" in request.param else yarn
    rule = "row" if request.param == "tiers by row" else "position"
    return lambda model: longrope.apply(model, sets, rule)


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def on_meta(model_type):
    config = families.build(model_type).config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def emptied(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.to_empty(device="cpu").load_state_dict(weights)
    return model


def by_meta(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(weights)
    return model


def in_16_bits_and_back(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(torch.bfloat16).half().float().load_state_dict(weights)
    return model


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    return model


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "to_empty": emptied,
    "meta and to_empty": by_meta,
    "16 bits and back": in_16_bits_and_back,
    "offload hooks": offloaded,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_applied_model_is_itself_afterwards(model_type, applied, way):
    model, ids = applied(families.build(model_type)), tokens(2, 100)
    expected = logits(model, ids)
    plain = logits(families.build(model_type), ids)
    assert not torch.equal(expected, plain)
    model = way(model)
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(longrope.remove(model), ids), plain)


def test_factors_applied_on_the_meta_device(model_type, applied):
    ids, expected = tokens(2, 100), applied(families.build(model_type))
    weights = expected.state_dict()
    for late in (False, True):  # the weights come before the factors, or after them
        model = on_meta(model_type)
        if late:
            applied(model).to_empty(device="cpu").load_state_dict(weights)
        else:
            model.load_state_dict(weights, assign=True)
            applied(model)
        assert torch.equal(logits(model, ids), logits(expected, ids))


def test_factors_applied_to_an_offloaded_model(model_type, applied):
    ids, model = tokens(2, 100), applied(offloaded(families.build(model_type)))
    assert torch.equal(logits(model, ids), logits(applied(families.build(model_type)), ids))
    plain = logits(families.build(model_type), ids)
    assert torch.equal(logits(longrope.remove(model), ids), plain)


def test_16_bits_turn_by_the_angles_of_the_model_in_16_bits(model_type, applied):
    """The first tier in bfloat16 is the plain model in bfloat16, rounded frequencies and all."""
    ids = tokens(2, 20)
    model = applied(families.build(model_type)).to(torch.bfloat16)
    again = applied(families.build(model_type).to(torch.bfloat16))
    assert torch.equal(logits(model, ids), logits(again, ids))


def test_a_dynamic_model_that_has_grown():
    """What "dynamic" has grown to is in its frequencies, and is reset with them."""
    model = families.build("llama", rope_type="dynamic", factor=2.0)
    short, long = tokens(2, 20), tokens(2, 100)
    expected = logits(model, short), logits(model, long)
    yarn = longrope.RescaleFactors.yarn(**families.sizes("llama"))
    with pytest.warns(UserWarning, match="dynamic"):
        longrope.apply(model, yarn)
    longrope.remove(emptied(model))
    assert torch.equal(logits(model, short), expected[0])
    assert torch.equal(logits(model, long), expected[1])
