"""Tiers by position where callers differ: masks of any form, threads, autocast, processes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest
import torch
from support.families import VERSION_5, sizes
from support.families import build as build_family
from support.tiny_models import TARGET, build, factors, tokens
from transformers import StaticCache

import longrope
from longrope.patching.tier_pass import cache_argument

pytestmark = pytest.mark.usefixtures("one_thread")

LADDER = factors("yarn", attention_factor=1.1).ladder()


@pytest.fixture
def model():
    return longrope.apply(build(), LADDER)


@torch.no_grad()
def whole(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


def apart(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_static_generation_of_a_padded_row(kind):
    """There `generate` makes a mask of pairs, by layer type for some families."""
    model, ids = build_family(kind), tokens(2, 60)
    longrope.apply(model, longrope.RescaleFactors.yarn(**sizes(kind)).ladder())
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=2, do_sample=False, disable_compile=True,
        cache_implementation="static", return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    for step, logits in enumerate(out.logits):
        row = out.sequences[:1, 15 : 60 + step]
        assert apart(logits[0], whole(model, row)[0, -1]) < 1e-4


def test_a_mask_of_pairs(model):
    ids = tokens(1, 60)
    causal = torch.ones(60, 60, dtype=torch.bool).tril()[None, None]
    assert torch.equal(whole(model, ids, attention_mask=causal), whole(model, ids))
    blocks = causal.clone()
    blocks[..., 30:, :30] = False
    with pytest.raises(ValueError, match=r"^attention_mask: expected padding alone"):
        whole(model, ids, attention_mask=blocks)


def test_a_mask_as_long_as_a_static_cache(model):
    ids = tokens(2, 100)
    mask = torch.zeros(2, TARGET, dtype=torch.int64)
    mask[:, :100] = 1
    cache = StaticCache(config=model.config, max_cache_len=TARGET)
    name = cache_argument(model.model)
    with torch.no_grad():
        model(ids[:, :90], attention_mask=mask, **{name: cache})
        positions = torch.arange(90, 100)[None]
        last = model(ids[:, 90:], attention_mask=mask, position_ids=positions, **{name: cache})
        with pytest.raises(ValueError, match=r"^cache: expected room for 140 tokens"):
            model(ids[:, :40], **{name: cache})
    assert apart(last.logits, whole(model, ids)[:, 90:]) < 1e-4


def test_padding_behind_a_row_does_not_count(model):
    """A row of 20 tokens, padded to 40, generates its next ones in the first tier."""
    ids = tokens(1, 20)
    name = cache_argument(model.model)
    padded = torch.cat([ids, torch.zeros(1, 20, dtype=torch.int64)], 1)
    mask = (padded != 0).long()
    following = tokens(1, 1)
    with torch.no_grad():
        out = model(padded, attention_mask=mask, use_cache=True)
        cache = out.past_key_values
        assert all(not layer.form.any() for layer in cache.layers)
        mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.int64)], 1)
        model(following, attention_mask=mask, **{name: cache})
    assert all(not layer.form.any() for layer in cache.layers)


def test_packed_documents_are_apart_as_transformers_has_it(model):
    """Where no mask is given and nothing is cached; with a cache or a mask a row is one text."""
    ids = tokens(1, 100)
    positions = torch.cat([torch.arange(50)] * 2)[None]
    apart_from = whole(model, ids[:, 50:])
    packed = whole(model, ids, position_ids=positions)[:, 50:]
    assert apart(packed, apart_from) < 1e-4
    for given in (
        {"use_cache": True},
        {"use_cache": False, "attention_mask": torch.ones_like(ids)},
    ):
        with torch.no_grad():
            together = model(ids, position_ids=positions, **given).logits
        assert apart(together[:, 50:], apart_from) > 1e-2
        with_gradient = model(ids, position_ids=positions, **given).logits.detach()
        assert apart(with_gradient, together) < 1e-4


def test_threads_do_not_mix(model):
    lengths = (20, 100, 60, 90)
    texts = [tokens(1, n) for n in lengths]
    expected = [whole(model, text) for text in texts]
    wrong, start = [], threading.Barrier(len(texts))

    def work(text, want):
        start.wait()
        for _ in range(12):
            if apart(whole(model, text), want) > 1e-4:
                wrong.append(text.shape[1])

    pairs = zip(texts, expected, strict=True)
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "kind",
    ["llama", "qwen3"] + ["gemma3_text", "olmo3"] * VERSION_5,  # which tiers take from 5 on
)
@pytest.mark.parametrize("use_cache", [False, True])
def test_autocast(kind, use_cache):
    """Queries and keys that a norm of float32 weights has made float32 too."""
    model, ids = longrope.apply(build_family(kind), LADDER), tokens(1, 80)
    expected = whole(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            actual = model(ids, use_cache=use_cache).logits
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
    assert apart(actual, expected) < 0.1 * expected.abs().max()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("given", [LADDER, factors()], ids=["tiers", "one set"])
def test_a_pickle_runs_in_another_process(given, tmp_path):
    model, ids = longrope.apply(build(), given), tokens(1, 60)
    torch.save({"model": model, "ids": ids, "logits": whole(model, ids)}, tmp_path / "model.pt")
    code = (
        "import sys, torch, longrope\n"
        f"kept = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "with torch.no_grad():\n"
        "    logits = kept['model'](kept['ids'], use_cache=False).logits\n"
        "assert (logits - kept['logits']).abs().max() < 1e-4\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gradients_through_chunks_of_the_first_window():
    """There the model is what it was, its cache included."""
    ids = tokens(1, 20)

    def gradient(model):
        name = cache_argument(model.model)
        first = model(ids[:, :10], use_cache=True)
        second = model(ids[:, 10:], **{name: first.past_key_values})
        (first.logits.sum() + second.logits.square().sum()).backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad

    torch.testing.assert_close(gradient(longrope.apply(build(), LADDER)), gradient(build()))


def test_an_emptied_cache_serves_other_tiers(model):
    ids, name = tokens(1, 40), cache_argument(model.model)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-40)
        longrope.apply(model, factors(target=256).ladder())
        out = model(ids, **{name: cache}).logits
    assert apart(out, whole(model, ids)) < 1e-4


def test_another_attention_is_chosen_afterwards(model):
    ids = tokens(1, 60)
    expected = whole(model, ids)
    model.set_attn_implementation("eager")
    assert apart(whole(model, ids), expected) < 1e-4
    longrope.remove(model)
    assert model.config._attn_implementation == "eager"


def test_a_cache_given_by_position_as_none(model):
    ids = tokens(1, 40)
    with torch.no_grad():
        hidden = model.model(ids, None, None, None).last_hidden_state
    assert apart(model.lm_head(hidden).detach(), whole(model, ids)) < 1e-4


@pytest.fixture
def fresh_compiler():
    """Compile anew: frames that were compiled too often by then would run as they are."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_with_a_growing_cache():
    """Prefill, tokens across both crossings, gradients; it breaks into graphs by itself."""
    ladder = longrope.Tiers([LADDER[0], *(tier.spread(2, 2) for tier in LADDER[1:])])
    model, ids = longrope.apply(build(), ladder), tokens(2, 70)
    expected = whole(model, ids)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert apart(compiled(ids).logits, expected) < 1e-4
        cache = compiled(ids[:, :20], use_cache=True).past_key_values
        for begin, end in itertools.pairwise([20, 32, 33, 64, 70]):
            logits = compiled(ids[:, begin:end], past_key_values=cache).logits
            assert apart(logits, expected[:, begin:end]) < 1e-4
    compiled(ids).logits.square().mean().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(ids).logits.square().mean().backward()
    for one, other in zip(ours, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_pass_with_a_cache_that_is_not_prepared_says_so(model):
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match="expected use_cache=False, or a Static"):
        compiled(tokens(1, 40), use_cache=True)
