"""longrope.apply and remove on tiny random models, against transformers' own rope types."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from support.tiny_models import (
    CONFIGS,
    ORIGINAL,
    TARGET,
    build,
    factors,
    rope_arguments,
    tokens,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CohereConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    StaticCache,
)

import longrope
from longrope import RescaleFactors
from longrope.patching import RopeSettings, embedding, rope_settings, rotary_of, rotation
from longrope.patching.tier_pass import cache_argument

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

TYPES = [
    ("pi", {"rope_type": "linear", "factor": 4.0}),
    ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
    ("ntk", {"rope_type": "dynamic", "factor": 1.0}),
]


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, **inputs).logits


@pytest.fixture(params=["kernels", "tables"])
def path(request, monkeypatch):
    """Run with ops.rope, and as on a device whose kernels are not built."""
    if request.param == "tables":
        monkeypatch.setattr(embedding, "DEVICES_WITH_KERNELS", ())


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("kind, rope", TYPES)
def test_equals_transformers_rope_types(model_type, kind, rope, path):
    ids = tokens()
    expected = logits(build(model_type, rope), ids)
    model = build(model_type)
    unscaled = logits(model, ids)
    actual = logits(longrope.apply(model, factors(kind)), ids)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (actual - unscaled).abs().max() > 0.1


class PlainRotary(nn.Module):
    """What transformers' attention layers take, written out: float64 tables, two frequencies."""

    def __init__(self, rescaled: RescaleFactors):
        super().__init__()
        self.factors = rescaled

    def forward(self, x, position_ids):
        f, angles = self.factors, []
        for row in position_ids.tolist():
            angles.append([])
            for n in row:
                keep = n < f.start_tokens
                turns = [
                    n / ((1 if keep else f.lambdas[i]) * f.rope_theta ** (2 * i / f.rotary_dim))
                    for i in range(f.rotary_dim // 2)
                ]
                angles[-1].append(turns + turns)
        angles = torch.tensor(angles, dtype=torch.float64)
        return tuple((f.attention_factor * t).to(x.dtype) for t in (angles.cos(), angles.sin()))


@pytest.mark.parametrize("start_tokens", [0, 1, 5, 200])
def test_start_tokens_and_attention_factor(start_tokens, path):
    ids = tokens(2, 48)
    rescaled = factors("ntk", start_tokens=start_tokens, attention_factor=1.3)
    model = build(dtype=torch.float64)
    own, model.model.rotary_emb = model.model.rotary_emb, PlainRotary(rescaled)
    expected = logits(model, ids)
    model.model.rotary_emb = own
    actual = logits(longrope.apply(model, rescaled), ids)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_remove_restores_every_bit(model_type):
    ids = tokens()
    model = build(model_type)
    config, keys = model.config.to_dict(), list(model.state_dict())
    before = logits(model, ids)
    for applied in (factors(), [factors(), factors("none", target=ORIGINAL)]):
        assert longrope.apply(model, applied) is model
        assert list(model.state_dict()) == keys and model.config.to_dict() == config
        assert not torch.equal(logits(model, ids), before)
    assert longrope.remove(model) is model
    assert torch.equal(logits(model, ids), before)
    assert list(model.state_dict()) == keys and model.config.to_dict() == config
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks
    assert torch.equal(logits(longrope.remove(model), ids), before)


def test_other_models_of_the_class_are_untouched():
    ids = tokens()
    model, other = build(), build(num_hidden_layers=1)
    before = logits(other, ids)
    longrope.apply(model, factors())
    assert torch.equal(logits(other, ids), before)


def test_applying_again_replaces():
    ids = tokens()
    expected = logits(longrope.apply(build(), factors("ntk")), ids)
    model = longrope.apply(build(), [factors("yarn"), factors("none", target=ORIGINAL)])
    assert torch.equal(logits(longrope.apply(model, factors("ntk")), ids), expected)
    assert len(model.model._forward_pre_hooks) == 1  # of the last


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation):
    ids = tokens()
    expected = logits(longrope.apply(build(), factors()), ids)
    model = longrope.apply(build(attn_implementation=implementation), factors())
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_exact_frequencies(path):
    """Casting the model casts neither the frequencies nor the angles."""
    ids = tokens(1)
    positions = torch.arange(TARGET)[None] + 2**20
    exact = longrope.apply(build(dtype=torch.bfloat16).double(), factors())
    before, after = (
        longrope.apply(build(dtype=torch.bfloat16), factors()),
        longrope.apply(build(), factors()).to(torch.bfloat16),
    )
    results = [logits(model, ids, position_ids=positions) for model in (before, after)]
    assert torch.equal(*results)
    # Rotation is relative, so far positions lose nothing beyond bf16 itself.
    error = (results[0].double() - logits(exact, ids, position_ids=positions)).abs().mean()
    near = (logits(before, ids).double() - logits(exact, ids)).abs().mean()
    assert error < 1.5 * near


def test_far_positions_are_exact():
    """The same text 2^21 tokens further on gives the same logits; float32 angles would not."""
    ids = tokens(1, 24)
    model = longrope.apply(build(), factors())
    far = logits(model, ids, position_ids=torch.arange(24)[None] + 2**21)
    torch.testing.assert_close(far, logits(model, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
def test_other_heads(cls):
    with torch.random.fork_rng():
        model = cls.from_config(build().config).eval()
    ids = tokens()
    with torch.no_grad():
        before = model(ids)[0]
        assert not torch.equal(longrope.apply(model, factors())(ids)[0], before)
        assert torch.equal(longrope.remove(model)(ids)[0], before)


def test_generate_equals_running_everything_again():
    model = longrope.apply(build(), factors())
    ids = tokens(2, 8)
    settings = {"max_new_tokens": 40, "do_sample": False, "output_logits": True,
                "return_dict_in_generate": True}  # fmt: skip
    cached = model.generate(ids, **settings)
    again = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached.sequences, again.sequences)
    for step, logit in enumerate(cached.logits):
        full = logits(model, cached.sequences[:, : 8 + step])[:, -1]
        torch.testing.assert_close(logit, full, rtol=1e-3, atol=1e-3)


def test_left_padding_generates_the_same():
    model = longrope.apply(build(), factors(start_tokens=2))
    short, long = tokens(1, 5), tokens(1, 11)
    batch = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.int64), short], 1), long])
    both = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=20,
                          do_sample=False)[:, 11:]  # fmt: skip
    for row, ids in enumerate((short, long)):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                               do_sample=False)  # fmt: skip
        assert torch.equal(alone[0, ids.shape[1] :], both[row])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    ids = tokens(2, 24)
    gradients = []
    for checkpointing in (False, True):
        model = longrope.apply(build(), factors()).train()
        if checkpointing:
            with warnings.catch_warnings():  # renamed in transformers 5, the only name in 4
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_compiles_without_a_graph_break():
    ids = tokens()
    model = longrope.apply(build(), factors())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    longrope.apply(compiled, factors("ntk"))
    expected = logits(longrope.apply(build(), factors("ntk")), ids)
    torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)


def test_saved_model_is_the_plain_one(tmp_path):
    ids = tokens()
    model = build()
    before = logits(model, ids)
    longrope.apply(model, [factors(), factors("none", target=ORIGINAL)])
    with pytest.warns(UserWarning, match=r"without the rescale factors .* longrope\.export"):
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, ids), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(duplicate):
    ids = tokens()
    model = build()
    before = logits(model, ids)
    longrope.apply(model, [factors(), factors("none", target=ORIGINAL)])
    twin = duplicate(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    assert torch.equal(logits(longrope.remove(twin), ids), before)
    assert not twin.model._forward_pre_hooks
    assert not torch.equal(logits(model, ids), before)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        (GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8),
         'expected a model with rotary position embeddings, got model_type "gpt2"'),
        (CohereConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16,
                      num_attention_heads=2, num_key_value_heads=1, vocab_size=8),
         'expected one of the model types llama, mistral, qwen2, .*, got "cohere"'),
    ],
    ids=["gpt2", "cohere"],
)  # fmt: skip
def test_other_models_are_refused(config, message):
    model = AutoModelForCausalLM.from_config(config)
    for call in (lambda: longrope.apply(model, factors()), lambda: longrope.remove(model)):
        with pytest.raises(ValueError, match=f"^model: {message}"):
            call()


def test_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model: expected a Hugging Face model .*, got Linear"):
        longrope.apply(nn.Linear(2, 2), factors())


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (factors(rope_theta=500000.0), ValueError, "expected rope_theta 10000, as in the model, "),
        (RescaleFactors.none(original_length=32, rotary_dim=32), ValueError,
         "expected rotary_dim 16, as in the model, got 32"),
        ([], ValueError, "expected at least one RescaleFactors, got an empty list"),
        ([factors(), factors("pi")], ValueError, "got two of 128 tokens"),
        ([factors(), 1.0], TypeError, "got an element of type float"),
        (8.0, TypeError, "expected RescaleFactors or a list of them, got float"),
    ],
)  # fmt: skip
def test_wrong_factors_are_refused(wrong, error, message):
    model, ids = build(), tokens()
    before = logits(model, ids)
    with pytest.raises(error, match=f"^factors: .*{message}"):
        longrope.apply(model, wrong)
    assert torch.equal(logits(model, ids), before)


def test_own_scaling_is_switched_off_with_a_warning():
    ids = tokens()
    model = build(rope=TYPES[1][1])
    with pytest.warns(UserWarning, match='own rope scaling "yarn" is switched off'):
        longrope.apply(model, factors("pi"))
    expected = logits(longrope.apply(build(), factors("pi")), ids)
    assert torch.equal(logits(model, ids), expected)


def test_a_later_patch_of_the_same_function_is_named(monkeypatch):
    from transformers.models.llama import modeling_llama

    model = longrope.apply(build(), factors())

    def foreign(q, k, cos, sin, unsqueeze_dim=1):
        return q * cos.unsqueeze(unsqueeze_dim), k * sin.unsqueeze(unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", foreign)
    with pytest.raises(RuntimeError, match=r"was replaced after longrope.apply"):
        logits(model, tokens())
    # Applied again, ours goes around the foreign one.
    logits(longrope.apply(model, factors()), tokens())


def test_rotary_of_needs_factors():
    with pytest.raises(ValueError, match="expected a model with factors applied"):
        rotary_of(build())
    assert "tiers up to 128 tokens" in repr(rotary_of(longrope.apply(build(), factors())))


# --- settings -------------------------------------------------------------------------------------


def test_rope_settings():
    base = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    plain = LlamaConfig(**base, **rope_arguments(5e5))
    assert rope_settings(plain) == RopeSettings("llama", 5e5, 16, 16, 512)
    assert rope_settings(build()) == RopeSettings("llama", 1e4, 16, 16, ORIGINAL)
    assert rope_settings(LlamaConfig(**base, head_dim=32)).head_dim == 32
    partial = LlamaConfig(**base, **rope_arguments(partial_rotary_factor=0.5))
    assert rope_settings(partial) == RopeSettings("llama", 1e4, 8, 16, 512)
    windowed = CONFIGS["mistral"](**base, sliding_window=128)
    assert rope_settings(windowed).original_length == 512
    scaled = rope_arguments(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    assert rope_settings(LlamaConfig(**base, **scaled)).original_length == 128
    with pytest.raises(ValueError, match='got model_type "bert"'):
        rope_settings(BertConfig())


class Version4Config:
    """How transformers 4 keeps the settings."""

    model_type, hidden_size, num_attention_heads = "llama", 64, 4
    max_position_embeddings, rope_theta, partial_rotary_factor = 2048, 5e5, 0.25
    rope_scaling = None


def test_rope_settings_of_transformers_4():
    config = Version4Config()
    assert rope_settings(config) == RopeSettings("llama", 5e5, 4, 16, 2048)
    config.rope_scaling = {"type": "yarn", "original_max_position_embeddings": 512}
    assert rope_settings(config).original_length == 512


def test_ops_need_no_transformers():
    code = "import longrope.ops, longrope.factors, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tables_are_exact():
    positions = torch.tensor([[0, 3, 2**21]])
    inv_freq = torch.tensor([1.0, 0.1], dtype=torch.float64)
    arguments = rotation.KernelRotation(positions, inv_freq, 0, inv_freq, 2.0)
    table = rotation.tabulate(arguments, torch.float32)
    assert table.cos.shape == (1, 3, 2)
    assert table.sin[0, 2, 1].item() == pytest.approx(2 * math.sin(2**21 * 0.1), abs=1e-6)


VERSION = int(transformers.__version__.split(".")[0])


# --- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_other_factors_is_refused(kind):
    """With one set as with tiers: never attended silently."""
    model, ids = build(), tokens(1, 40)
    name = cache_argument(model.model)

    def filled():
        cache = (
            DynamicCache(config=model.config)
            if kind == "dynamic"
            else StaticCache(config=model.config, max_cache_len=64)
        )
        with torch.no_grad():
            model(ids, **{name: cache})
        return cache

    plain = filled()
    longrope.apply(model, factors())
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"^cache: expected an empty cache, or one that was"):
            model(ids[:, :1], **{name: plain})
        ours, theirs = filled(), filled()
        model(ids[:, :1], **{name: ours})
        longrope.apply(model, factors("ntk"))
        with pytest.raises(ValueError, match=r"^cache: expected an empty cache, or one that was"):
            model(ids[:, :1], **{name: ours})
        if kind == "static" or VERSION >= 5:  # transformers 4 keeps the length of a growing cache
            ours.reset()
            model(ids[:, :1], **{name: ours})
        longrope.remove(model)
        with pytest.raises(ValueError, match=r"^cache: expected one that was filled without"):
            model(ids[:, :1], **{name: theirs})
