"""Tiers by row: each by its own length, and a cache that survives a row's change of tier."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny_models import ORIGINAL, build, factors, tokens
from transformers import DynamicCache, StaticCache

import longrope
from longrope.patching import embedding, row_lengths, row_tiers

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = factors("none", target=ORIGINAL)
MIDDLE = factors("ntk", target=48, start_tokens=4, attention_factor=1.1)
LONG = factors("yarn")
TIERS = [LONG, SHORT, MIDDLE]  # in any order


@pytest.fixture(params=["kernels", "tables"])
def path(request, monkeypatch):
    """Run with ops.rope, and as on a device whose kernels are not built."""
    if request.param == "tables":
        for module in (embedding, row_tiers):
            monkeypatch.setattr(module, "DEVICES_WITH_KERNELS", ())


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, **inputs).logits


def one_layer(model_type="llama", **extra):
    """A model whose keys depend on tokens alone, so that turning them makes the cache exact."""
    return longrope.apply(build(model_type, num_hidden_layers=1, **extra), TIERS, "row")


@pytest.mark.parametrize(
    "length, chosen",
    [(1, SHORT), (31, SHORT), (32, SHORT), (33, MIDDLE), (48, MIDDLE), (49, LONG), (128, LONG),
     (140, LONG)],
)  # fmt: skip
def test_a_length_up_to_the_target_takes_the_tier(length, chosen):
    ids = tokens(2, length)
    model = build()
    expected = logits(longrope.apply(model, chosen), ids)
    actual = logits(longrope.apply(model, TIERS, "row"), ids)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_choose_for_themselves(path):
    lengths = (20, 32, 33, 60)
    rows = [tokens(1, n) for n in lengths]
    model = build()
    expected = [
        logits(longrope.apply(model, tier), row)[0]
        for row, tier in zip(rows, (SHORT, SHORT, MIDDLE, LONG), strict=True)
    ]
    longrope.apply(model, TIERS, "row")
    for side in ("right", "left"):
        pads = [torch.zeros(1, 60 - n, dtype=torch.int64) for n in lengths]
        pairs = zip(rows, pads, strict=True)
        batch = torch.cat([torch.cat(p if side == "right" else p[::-1], 1) for p in pairs])
        mask = (batch != 0).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = [{"position_ids": positions}]
        if side == "right":  # without position_ids the model counts from the left
            inputs += [{}]
        for given in inputs:
            actual = logits(model, batch, attention_mask=mask, **given)
            for row, (n, want) in enumerate(zip(lengths, expected, strict=True)):
                got = actual[row, :n] if side == "right" else actual[row, -n:]
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_inputs_embeds_and_positional_arguments():
    ids = tokens(2, 40)
    model = longrope.apply(build(), TIERS, "row")
    expected = logits(model, ids)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(logits(model, None, inputs_embeds=embedded), expected)
    with torch.no_grad():
        hidden = model.model(ids, torch.ones_like(ids))[0]
        assert torch.equal(model.lm_head(hidden), expected)


@pytest.mark.parametrize("step", [1, 3, 20])
@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
def test_cached_keys_follow_the_tier(cache, step, path):
    """Decoding across both borders gives what one pass over the whole text gives."""
    ids = tokens(2, 60)
    model = one_layer("mistral", sliding_window=24) if cache == "sliding" else one_layer(
        "mistral", sliding_window=None)  # fmt: skip
    kept = None
    if cache == "static":
        kept = StaticCache(config=model.config, max_cache_len=64)
    for start in range(0, 60, step):
        with torch.no_grad():
            out = model(ids[:, start : start + step], past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        full = logits(model, ids[:, : start + step])[:, start:]
        torch.testing.assert_close(out.logits, full, rtol=1e-3, atol=1e-3)


def test_rows_cross_at_different_steps():
    rows = [tokens(1, n) for n in (25, 30)]
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.int64), rows[0]], 1), rows[1]])
    model = one_layer()
    mask = (batch != 0).long()
    out = model.generate(batch, attention_mask=mask, max_new_tokens=30, do_sample=False)
    for row, ids in enumerate(rows):
        for _ in range(30):  # no cache
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
        assert torch.equal(out[row, -30:], ids[0, -30:])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_across_the_border(beams):
    model = one_layer()
    settings = {"max_new_tokens": 30, "num_beams": beams, "do_sample": False}
    ids = tokens(2, 24)
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


def test_first_layer_keys_are_those_of_a_fresh_pass():
    """In a deep model the keys of deeper layers differ, because their hidden states do."""
    ids = tokens(2, 40)
    model = longrope.apply(build(), TIERS, "row")
    with torch.no_grad():
        kept = model(ids[:, :30], use_cache=True).past_key_values
        kept = model(ids[:, 30:], past_key_values=kept).past_key_values
        fresh = model(ids, use_cache=True).past_key_values
    torch.testing.assert_close(kept.layers[0].keys, fresh.layers[0].keys, rtol=1e-4, atol=1e-5)
    assert (kept.layers[1].keys - fresh.layers[1].keys).abs().max() > 0.01


def test_a_cropped_cache_goes_back():
    ids = tokens(2, 40)
    model = one_layer()
    with torch.no_grad():
        kept = model(ids, use_cache=True).past_key_values
        kept.crop(-20)
        out = model(ids[:, 20:25], past_key_values=kept).logits
    expected = logits(model, ids[:, :25])[:, 20:]
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_copied_and_repeated_caches():
    ids = tokens(2, 30)
    model = one_layer()
    with torch.no_grad():
        prompt = model(ids, use_cache=True).past_key_values
    more = tokens(4, 6)
    kept = copy.deepcopy(prompt)
    kept.batch_repeat_interleave(2)
    out = logits(model, more, past_key_values=kept)
    whole = torch.cat([ids.repeat_interleave(2, 0), more], 1)
    torch.testing.assert_close(out, logits(model, whole)[:, 30:], rtol=1e-3, atol=1e-3)
    # The cache it was copied from is as it was.
    again = logits(model, more[::2], past_key_values=prompt)
    torch.testing.assert_close(again, out[::2], rtol=1e-3, atol=1e-3)


def test_other_factors_applied_while_generating():
    ids = tokens(2, 40)
    model = one_layer()
    with torch.no_grad():
        kept = model(ids[:, :30], use_cache=True).past_key_values
        longrope.apply(model, [factors("pi", target=64), factors("ntk")], "row")
        out = model(ids[:, 30:], past_key_values=kept).logits
    torch.testing.assert_close(out, logits(model, ids)[:, 30:], rtol=1e-3, atol=1e-3)


def test_planned_lengths_choose_from_the_first_chunk():
    ids = tokens(2, 60)
    model = longrope.apply(build(), TIERS, "row")  # two layers: turning keys would not be enough
    expected = logits(model, ids)
    chunks, kept = [], None
    with torch.no_grad(), row_lengths(model, 60):
        for start in range(0, 60, 20):
            out = model(ids[:, start : start + 20], past_key_values=kept, use_cache=True)
            kept = out.past_key_values
            chunks.append(out.logits)
    torch.testing.assert_close(torch.cat(chunks, 1), expected, rtol=1e-3, atol=1e-3)
    short = logits(model, ids[:, :20])
    assert (short - expected[:, :20]).abs().max() > 0.01


def test_a_cache_from_elsewhere_is_refused():
    ids = tokens(2, 40)
    model = build()
    with torch.no_grad():
        foreign = model(ids[:, :30], use_cache=True).past_key_values
    longrope.apply(model, TIERS, "row")
    with pytest.raises(ValueError, match=r"past_key_values: .* got 30 tokens of unknown rotation"):
        logits(model, ids[:, 30:], past_key_values=foreign)


def test_a_cache_of_selected_rows_is_refused():
    ids = tokens(3, 30)
    model = one_layer()
    with torch.no_grad():
        kept = model(ids, use_cache=True).past_key_values
    kept.batch_select_indices(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"past_key_values: .* the 3 rows .*, got 2"):
        logits(model, tokens(2, 4), past_key_values=kept)


def test_unknown_cache_layers_are_refused_only_when_a_row_changes_tier():
    class Packed(type(DynamicCache().layer_class_to_replicate())):
        pass

    ids = tokens(2, 40)
    model = one_layer()
    kept = DynamicCache()
    kept.layer_class_to_replicate = Packed
    with torch.no_grad():
        kept = model(ids[:, :20], past_key_values=kept, use_cache=True).past_key_values
        kept = model(ids[:, 20:30], past_key_values=kept).past_key_values
    with pytest.raises(ValueError, match=r"whose keys can be turned .*, got Packed"):
        logits(model, ids[:, 30:], past_key_values=kept)


def test_a_failed_pass_leaves_nothing_behind():
    ids = tokens(2, 40)
    model = longrope.apply(build(), TIERS, "row")
    expected = logits(model, ids)
    with pytest.raises(IndexError):
        logits(model, ids[:, :10] + 1000)
    assert model.model.rotary_emb.tier is None
    assert torch.equal(logits(model, ids), expected)
