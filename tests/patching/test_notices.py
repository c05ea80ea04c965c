"""What is said where factors may not do what their user expects: one warning for each cause."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from support import families
from support.tiny_models import ORIGINAL, ROTARY_DIM, TARGET, build, factors, tokens
from transformers import AutoModelForCausalLM

import longrope
from longrope.patching.notices import farthest, window_notice

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = "every layer of the model has a sliding window, of at most 16 tokens: among 128 tokens"

#: What makes every layer of a family slide.
ALL_SLIDE = {"mistral": {}, "qwen2": {"use_sliding_window": True, "max_window_layers": 0}}


def said(call, *arguments, **options):
    """Return the warnings of a call, each of which must name this file."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call(*arguments, **options)
    assert {warning.filename for warning in found} <= {__file__}
    return [str(warning.message) for warning in found]


def sliding(**options):
    return build("mistral", sliding_window=16, **options)


@pytest.mark.parametrize("ladder", [False, True])
def test_apply_says_that_the_window_ends_before_the_target(ladder):
    model = sliding()
    yarn = longrope.RescaleFactors.yarn(
        original_length=16 if not ladder else 8, target_length=TARGET, rotary_dim=ROTARY_DIM
    )
    (*_, message) = said(longrope.apply, model, yarn.ladder() if ladder else yarn)
    assert message.startswith(WINDOW)
    assert "sliding_window=None and count from original_length=16" in message


def test_perplexity_and_search_say_it_once():
    model, documents = sliding(), list(tokens(4, 2 * TARGET))
    messages = said(longrope.perplexity, model, documents, length=TARGET, stride=TARGET)
    assert len(messages) == 1
    assert messages[0].startswith(WINDOW)
    messages = said(
        longrope.search, model, documents, target_length=TARGET, method="gradient", steps=1,
        samples=1, progress=False,
    )  # fmt: skip
    assert len(messages) == 1
    assert messages[0].startswith(WINDOW)


def test_without_the_window_nothing_is_said():
    model = sliding()
    assert farthest(model) == 16
    assert window_notice(model, 16) is None
    assert farthest(build("mistral", sliding_window=None)) is None


@pytest.mark.parametrize("model_type", ["gemma2", "qwen2"])
def test_layers_that_slide_among_layers_that_do_not(model_type):
    """Full-attention layers see every distance: nothing to say."""
    extra = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}
    model = build("qwen2", **extra) if model_type == "qwen2" else families.build(model_type)
    assert farthest(model) is None
    yarn = longrope.RescaleFactors.yarn(**families.sizes(model_type))
    assert said(longrope.apply, model, yarn) == []


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_model_that_is_loaded_as_the_notice_says_has_no_window(tmp_path, kind):
    model = build(kind, sliding_window=16, **ALL_SLIDE[kind])
    notice = window_notice(model, TARGET)
    with pytest.raises(ValueError, match="a layer that sees beyond the first tier") as refused:
        longrope.apply(model, factors().ladder())
    name, text = re.search(r"load the model with (\w+)=(.*?) and count", notice).groups()
    assert str(refused.value).endswith(f"load the model with {name}={text}")
    value = None if text == "None" else ["full_attention"] * 2
    assert text in ("None", '["full_attention"] * 2')
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **{name: value})
    assert farthest(again) is None
    ids = tokens(1, 40)
    assert not torch.allclose(again(ids).logits, model(ids).logits)  # it sees farther


def test_a_model_of_no_family_has_no_farthest():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=64))
    assert farthest(model) is None


def test_another_original_length_is_questioned():
    yarn = factors(original_length=ORIGINAL // 2)
    (message,) = said(longrope.apply, build(), yarn)
    assert message == (
        "the factors count from an original length of 16 tokens, and the model's configuration "
        "says 32: were they made for this model?"
    )
    assert said(longrope.apply, build(), factors()) == []


def test_the_window_of_sliding_layers_is_no_other_original_length():
    yarn = longrope.RescaleFactors.yarn(
        original_length=16, target_length=TARGET, rotary_dim=ROTARY_DIM
    )
    (message,) = said(longrope.apply, sliding(), yarn)
    assert message.startswith(WINDOW)


def test_factors_by_row_of_a_scaled_model_are_silent():
    """A search applies factors many times, and says nothing of the scaling each time."""
    model = build(rope={"rope_type": "linear", "factor": 2.0})
    with longrope.patching.rows(model, factors().inv_freq().copy()):
        pass
    assert len(said(longrope.apply, model, factors(original_length=ORIGINAL // 2))) == 1
