"""Tiers by position: the rule itself, and what it promises: no crossing, whatever is cut or cached.

The yardstick of the promises is the model without factors: what a cut of the prefill, a batch mate
or padding changes in its logits by arithmetic alone, times 4.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support.tier_rule import logits_by_the_rule, reference
from support.tiny_models import ORIGINAL, TARGET, build, factors, tokens
from transformers import DynamicCache, StaticCache

import longrope
from longrope.patching import rotary_of, tier_attention
from longrope.patching.tier_cache import UNROTATED

pytestmark = pytest.mark.usefixtures("one_thread")

LADDER = factors("yarn", attention_factor=1.1).ladder()  # limits 32, 64, 128
LENGTH = 100
VERSION = int(transformers.__version__.split(".")[0])
DTYPES = [torch.float32, torch.bfloat16]
CUTS = {"halves": [50, 50], "at the limits": [32, 32, 36], "around": [31, 2, 30, 2, 35],
        "tokens": [1] * LENGTH}  # fmt: skip


@pytest.fixture(params=["kernels", "tables"])
def path(request, monkeypatch):
    """Run with our kernels, and as on a device where they are not built."""
    if request.param == "tables":
        monkeypatch.setattr(tier_attention, "DEVICES_WITH_KERNELS", ())


@torch.no_grad()
def whole(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


@torch.no_grad()
def in_parts(model, ids, cuts, cache=None, **inputs):
    """Return the logits of a text that goes through the model in parts, with a cache."""
    start, parts = 0, []
    for count in cuts:
        given = {}
        for key, value in inputs.items():
            end = start + count
            given[key] = value[:, :end] if key == "attention_mask" else value[:, start:end]
        out = model(ids[:, start : start + count], use_cache=True, past_key_values=cache, **given)
        cache, start = out.past_key_values, start + count
        parts.append(out.logits)
    return torch.cat(parts, 1)


def apart(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


def rounding(model, ids):
    """Return how far a model without factors is from itself in float64: its own rounding."""
    return apart(whole(model, ids), whole(copy.deepcopy(model).double(), ids))


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_tokens", [0, 3])
def test_every_query_attends_under_its_tier(start_tokens, path):
    model, ids = build(), tokens(2, LENGTH)
    tiers = factors("yarn", attention_factor=1.1, start_tokens=start_tokens).ladder()
    expected = reference(model, ids, tiers)
    noise = rounding(model, ids)
    actual = whole(longrope.apply(model, tiers), ids)
    assert apart(actual, expected) < 4 * noise
    single = reference(model, ids, longrope.Tiers(factors("yarn", attention_factor=1.1)))
    assert apart(expected, single) > 0.1


def test_one_set_is_one_tier():
    model, ids = build(), tokens(1, LENGTH)
    expected = whole(longrope.apply(model, factors()), ids)
    assert torch.equal(whole(longrope.apply(model, longrope.Tiers(factors())), ids), expected)


def test_tiers_whose_first_is_not_the_model_as_loaded():
    model, ids = build(), tokens(1, LENGTH)
    tiers = longrope.Tiers([factors("ntk", target=48), factors()])
    actual = whole(longrope.apply(model, tiers), ids)
    assert apart(actual, reference(model, ids, tiers)) < 1e-4


def test_a_models_own_scaling_is_the_first_tier():
    scaling = {"rope_type": "linear", "factor": 2.0}
    model, ids = build(rope=scaling), tokens(1, LENGTH)
    settings = longrope.rope_settings(model)
    assert (settings.original_length, settings.loaded_length) == (ORIGINAL // 2, ORIGINAL)
    goal = longrope.RescaleFactors.yarn(**settings.lengths(TARGET))
    expected = whole(model, ids[:, :ORIGINAL])
    longrope.apply(model, goal.ladder(loaded=settings.loaded))
    assert torch.equal(whole(model, ids[:, :ORIGINAL]), expected)
    assert apart(whole(model, ids)[:, :ORIGINAL], expected) < 1e-4


# --- the first tier is the model as loaded --------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_first_tier_is_the_unpatched_model_bit_for_bit(dtype, implementation):
    model = build(dtype=dtype, attn_implementation=implementation)
    ids = tokens(3, ORIGINAL)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = {"attention_mask": mask, "position_ids": positions}
    cuts = [20, 1, 1, 10]
    expected = [
        whole(model, ids), whole(model, ids, **padded), whole(model, ids, attention_mask=mask),
        in_parts(model, ids, cuts), in_parts(model, ids, cuts, **padded),
    ]  # fmt: skip
    longrope.apply(model, LADDER)
    actual = [
        whole(model, ids), whole(model, ids, **padded), whole(model, ids, attention_mask=mask),
        in_parts(model, ids, cuts), in_parts(model, ids, cuts, **padded),
    ]  # fmt: skip
    assert all(map(torch.equal, actual, expected))
    assert model.config._attn_implementation == f"longrope_{implementation}"
    longrope.remove(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(in_parts(model, ids, cuts), expected[3])


def test_the_first_window_does_not_notice_what_comes_after():
    model, ids = build(), tokens(2, LENGTH)
    expected = whole(model, ids[:, :ORIGINAL])
    noise = max(apart(whole(model, ids)[:, :ORIGINAL], expected), rounding(model, ids))
    longrope.apply(model, LADDER)
    actual = whole(model, ids)[:, :ORIGINAL]
    assert apart(actual, expected) <= 4 * noise


# --- no crossing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", ["turned", "unrotated"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cuts_of_the_prefill_change_nothing(cache, cuts, kept, dtype, path):
    model, ids = build(dtype=dtype), tokens(2, LENGTH)

    def new():
        return StaticCache(config=model.config, max_cache_len=TARGET) if cache == "static" else None

    noise = apart(in_parts(model, ids, cuts, new()), whole(model, ids))
    noise = max(noise, rounding(model, ids))  # some cuts change no bit of the model itself
    longrope.apply(model, LADDER, cached_keys=kept)
    expected = whole(model, ids)
    actual = in_parts(model, ids, cuts, new())
    assert apart(actual, expected) <= 4 * noise


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("numbered", [True, False])
def test_batch_mates_and_padding_change_nothing(side, numbered, path):
    lengths = (20, 40, 70, LENGTH)
    rows = [tokens(1, n) for n in lengths]
    pads = [torch.zeros(1, LENGTH - n, dtype=torch.int64) for n in lengths]
    pairs = zip(rows, pads, strict=True)
    batch = torch.cat([torch.cat(p if side == "right" else p[::-1], 1) for p in pairs])
    mask = (batch != 0).long()
    inputs = {"attention_mask": mask}
    if numbered:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    model = build()

    def by_row(logits):
        cut = [slice(0, n) if side == "right" else slice(LENGTH - n, None) for n in lengths]
        return [logits[row, c] for row, c in enumerate(cut)]

    alone = [whole(model, row)[0] for row in rows]
    noise = max(map(apart, by_row(whole(model, batch, **inputs)), alone))
    noise = max(noise, rounding(model, rows[-1]))
    longrope.apply(model, factors("yarn", attention_factor=1.1, start_tokens=4).ladder())
    alone = [whole(model, row)[0] for row in rows]
    for actual in (
        whole(model, batch, **inputs), in_parts(model, batch, [45, 45, 10], **inputs),
    ):  # fmt: skip
        for ours, want in zip(by_row(actual), alone, strict=True):
            assert apart(ours, want) <= 4 * noise


def test_a_hole_in_the_mask():
    model, ids = build(), tokens(1, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 50:55] = 0
    inputs = {"attention_mask": mask, "position_ids": mask.cumsum(-1) - 1}
    longrope.apply(model, LADDER)
    kept = torch.cat([ids[:, :50], ids[:, 55:]], 1)
    assert apart(whole(model, ids, **inputs)[:, 55:], whole(model, kept)[:, 50:]) < 1e-4


def greedy(model, ids, count):
    """Generate without a cache: every token from one prefill of all before it."""
    for _ in range(count):
        ids = torch.cat([ids, whole(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


GENERATIONS = {
    "dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    # transformers 4 asks for an end of text: one that is no token.
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 64},
    "in chunks": {"prefill_chunk_size": 7},
}  # fmt: skip


@pytest.mark.parametrize("how", GENERATIONS.values(), ids=GENERATIONS.keys())
@pytest.mark.parametrize("kept", ["turned", "unrotated"])
def test_generation_across_all_crossings(how, kept):
    model, ids = longrope.apply(build(), LADDER, cached_keys=kept), tokens(1, 20)
    expected = greedy(model, ids, 60)
    actual = model.generate(ids, max_new_tokens=60, do_sample=False, **how)
    assert torch.equal(actual, expected)


def test_rows_of_a_batch_cross_at_different_steps():
    model = longrope.apply(build(), LADDER)
    rows = [tokens(1, n) for n in (20, 28)]
    batch = torch.cat([torch.cat([torch.zeros(1, 8, dtype=torch.int64), rows[0]], 1), rows[1]])
    out = model.generate(
        batch, attention_mask=(batch != 0).long(), max_new_tokens=60, do_sample=False
    )
    for row, ids in enumerate(rows):
        assert torch.equal(out[row, 28:], greedy(model, ids, 60)[0, len(ids[0]) :])


def test_beams():
    model, ids = longrope.apply(build(), LADDER), tokens(2, 28)
    how = {"max_new_tokens": 40, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))


@pytest.mark.parametrize("tiered", [True, False])
def test_assisted_decoding(tiered):
    model, assistant, ids = build(), build(num_hidden_layers=1), tokens(1, 28)
    longrope.apply(model, LADDER)
    if tiered:
        longrope.apply(assistant, LADDER)
    expected = model.generate(ids, max_new_tokens=50, do_sample=False)
    actual = model.generate(ids, max_new_tokens=50, do_sample=False, assistant_model=assistant)
    assert torch.equal(actual, expected)


def test_a_chat_that_keeps_its_cache():
    model, ids = longrope.apply(build(), LADDER), tokens(1, 90)
    cache = DynamicCache(config=model.config)
    said = ids[:, :20]
    for end in (40, 70, 90):
        model.generate(said, past_key_values=cache, max_new_tokens=3, do_sample=False)
        said = torch.cat([said, tokens(1, 3), ids[:, end - 10 : end]], 1)
        cache.crop(-2)  # the answer is put aside
        said = said[:, : cache.get_seq_length()]
        said = torch.cat([said, ids[:, end - 10 : end]], 1)
    out = model.generate(said, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert cache.get_seq_length() == said.shape[1] + 4
    assert out.shape[1] == said.shape[1] + 5


@pytest.mark.parametrize("kept", ["turned", "unrotated"])
def test_cropping_back_over_a_crossing(kept):
    model, ids = longrope.apply(build(), LADDER, cached_keys=kept), tokens(2, 80)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-55)
        again = in_parts(model, ids[:, 25:], [3, 52], cache)
    assert apart(again, whole(model, ids)[:, 25:]) < 1e-4


def test_rows_are_selected_repeated_and_reordered():
    model, ids = longrope.apply(build(), LADDER), tokens(3, 80)
    order = torch.tensor([2, 0])
    with torch.no_grad():
        cache = model(ids[:, :60], use_cache=True).past_key_values
        cache.batch_select_indices(order)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 1, 2, 0]))
        rows = torch.tensor([0, 2, 0, 2])
        actual = in_parts(model, ids[rows, 60:], [1, 19], cache)
    assert apart(actual, whole(model, ids)[rows, 60:]) < 1e-4


def test_keys_are_kept_as_promised():
    ids = tokens(1, 70)
    for kept, form in (("turned", 2), ("unrotated", UNROTATED)):
        model = longrope.apply(build(), LADDER, cached_keys=kept)
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        assert {int(layer.form) for layer in cache.layers} == {form}
        assert torch.equal(cache.layers[1].positions[0], torch.arange(70))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_static_cache_is_not_compiled_again_at_a_crossing(dtype):
    model, ids = longrope.apply(build(dtype=dtype), LADDER), tokens(2, LENGTH)
    expected = whole(model, ids)
    noise = apart(in_parts(model, ids, CUTS["tokens"]), expected)
    cache = StaticCache(config=model.config, max_cache_len=TARGET)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        for at in range(20, LENGTH):
            with torch.compiler.set_stance("fail_on_recompile" if at > 22 else "default"):
                given = {"position_ids": torch.full((2, 1), at)}
                if VERSION < 5:  # which counts a static cache on the host where this is not given
                    given["cache_position"] = torch.tensor([at])
                logits = step(
                    ids[:, at : at + 1], past_key_values=cache, use_cache=True, **given
                ).logits
            assert apart(logits[:, 0], expected[:, at]) <= 4 * noise


def test_a_compiled_pass_with_gradients():
    model, ids = longrope.apply(build(), LADDER), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def gradients(forward):
        model.zero_grad()
        forward(ids, use_cache=False, **inputs).logits[:, 6:].square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for ours, want in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-5)


def test_a_copy_and_a_pickle_go_on(tmp_path):
    model, ids = longrope.apply(build(), LADDER), tokens(1, 60)
    expected = whole(model, ids)
    copied = copy.deepcopy(model)
    del model
    assert torch.equal(whole(copied, ids), expected)
    torch.save(copied, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(whole(loaded, ids), expected)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_rule(checkpointing):
    model, ids = build(), tokens(2, 70)
    longrope.apply(model, LADDER)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    exact = longrope.remove(copy.deepcopy(model)).double()
    model(ids, labels=ids).loss.backward()
    logits = logits_by_the_rule(exact, ids, LADDER)[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for ours, want in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), want.grad, rtol=1e-3, atol=1e-5)


def test_documents_packed_into_a_row():
    model = longrope.apply(build(), LADDER)
    parts = [tokens(1, 40), tokens(1, 50)]
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts])[None]
    packed = whole(model, torch.cat(parts, 1), position_ids=positions)
    expected = torch.cat([whole(model, part) for part in parts], 1)
    assert apart(packed, expected) < 1e-4


def test_gradients_beside_a_filled_cache():
    model, ids = longrope.apply(build(), LADDER), tokens(1, 70)
    with torch.no_grad():
        cache = model(ids[:, :50], use_cache=True).past_key_values
    out = model(ids[:, 50:], past_key_values=cache, use_cache=True).logits
    assert apart(out.detach(), whole(model, ids)[:, 50:]) < 1e-4
    out.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


# --- refusals -------------------------------------------------------------------------------------


def test_a_cache_of_other_factors_is_refused():
    model, ids = build(), tokens(1, 40)
    with torch.no_grad():
        plain = model(ids, use_cache=True).past_key_values
        longrope.apply(model, LADDER)
        with pytest.raises(ValueError, match=r"^cache: expected an empty cache, or one"):
            model(ids[:, :1], past_key_values=plain)
        ours = model(ids, use_cache=True).past_key_values
        longrope.apply(model, LADDER[1:])
        with pytest.raises(ValueError, match=r"^cache: expected one that was filled under the"):
            model(ids[:, :1], past_key_values=ours)
        longrope.remove(model)
        with pytest.raises(ValueError, match=r"^cache: expected one that was filled without tiers"):
            model(ids[:, :1], past_key_values=ours)


def test_what_can_not_be_tiered_is_refused():
    mistral = build("mistral", sliding_window=16)
    with pytest.raises(ValueError, match=r"^model: expected a layer that sees beyond"):
        longrope.apply(mistral, LADDER)
    with pytest.raises(ValueError, match=r"^tiers: expected"):
        longrope.apply(build(), LADDER, "column")
    with pytest.raises(ValueError, match=r"^cached_keys: expected"):
        longrope.apply(build(), LADDER, cached_keys="both")
    refused = pytest.raises(ValueError, match="tiers by position, which lengths do not change")
    with refused, longrope.row_lengths(longrope.apply(build(), LADDER), 60):
        pass


def test_dropout_in_attention_is_refused():
    model = longrope.apply(build(attention_dropout=0.1), LADDER).train()
    with pytest.raises(ValueError, match=r"^dropout: expected no dropout"):
        model(tokens(1, 40))


def test_a_long_sliding_window():
    model, ids = build("mistral", sliding_window=48), tokens(2, LENGTH)
    longrope.apply(model, LADDER)
    expected = whole(model, ids)
    for cuts in ([50, 50], [1] * LENGTH):
        assert apart(in_parts(model, ids, cuts), expected) < 1e-4
    wide = longrope.apply(build("mistral", sliding_window=None), LADDER)
    assert apart(whole(wide, ids), expected) > 1e-2


def test_the_module_says_where_tiers_end():
    assert "32, 64, 128" in repr(rotary_of(longrope.apply(build(), LADDER)))
