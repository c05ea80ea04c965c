"""A range of positions alone, against the whole window under tiers by position."""

import pytest
import torch
from support import families, tiny_models

import longrope
from longrope.evaluation.modes import evaluating
from longrope.evaluation.nll import NextTokenNLL
from longrope.patching import rope_settings
from longrope.patching.families import FAMILIES, decoder
from longrope.patching.ranges import joined, range_cache, ranges, turned_as_loaded

ORIGINAL, MIDDLE, TARGET = 32, 64, 128
BUILT = [
    t for f in FAMILIES if f.tiers and (f.since < 5 or families.VERSION_5) for t in f.model_types
]


def tiers_of(model, start_tokens=2):
    lengths = rope_settings(model).lengths(TARGET)
    yarn = longrope.RescaleFactors.yarn(**lengths).replace(start_tokens=start_tokens)
    return longrope.Tiers([rope_settings(model).loaded, yarn.ladder()[1], yarn])


def held_prefix(model, score, rotary, tiers, window, differentiable=False):
    """Return a cache that holds a window's tokens below the last tier, tier by tier."""
    cache = range_cache(model, window.shape[1] - 1, tiers.limits[0], differentiable)
    for number, tier in enumerate(tiers[:-1]):
        if number == 0 and turned_as_loaded(model, tiers):
            rotary.turn_as_loaded()
        else:
            rotary.turn_by_factors(tier)
        score.feed(window, tier.target_length, cache)
    return cache


def of_range(model, tiers, windows, chunk=None):
    """Return the NLL of the last tier's range, its tokens alone going through the model."""
    with evaluating(model):
        score = NextTokenNLL(model, chunk)
        with ranges(model) as rotary:
            prefixes = [held_prefix(model, score, rotary, tiers, w[None]) for w in windows]
            cache = joined(prefixes, range_cache(model, TARGET - 1, tiers.limits[0]))
            rotary.turn_by_factors(tiers[-1])
            return score(windows, TARGET - MIDDLE - 1, cache)


def of_windows(model, tiers, windows):
    longrope.apply(model, tiers)
    try:
        with evaluating(model):
            return NextTokenNLL(model)(windows, TARGET - MIDDLE - 1)
    finally:
        longrope.remove(model)


@pytest.mark.parametrize("model_type", BUILT)
def test_the_losses_of_a_range_are_those_of_the_window_under_tiers(model_type):
    model = families.build(model_type)
    tiers = tiers_of(model)
    windows = torch.randint(1, 64, (2, TARGET), generator=torch.Generator().manual_seed(0))
    expected = of_windows(model, tiers, windows)
    for chunk in (None, 20):
        torch.testing.assert_close(
            of_range(model, tiers, windows, chunk), expected, rtol=2e-4, atol=2e-4
        )
    if model_type in ("gemma3_text", "olmo3"):
        return  # the one layer that the tiers turn is the last: those below leave no trace
    # It is not what one set of factors for all positions gives.
    assert (of_windows(model, tiers[2:], windows) - expected).abs().max() > 1e-2


def test_the_model_is_what_it_was_after_the_block():
    model = tiny_models.build()
    longrope.apply(model, tiers_of(model))
    ids = tiny_models.tokens()
    before = model(ids).logits
    with ranges(model):
        pass
    assert torch.equal(model(ids).logits, before)
    longrope.apply(model, tiny_models.factors())
    before = model(ids).logits
    with pytest.raises(KeyError), ranges(model):
        raise KeyError
    assert torch.equal(model(ids).logits, before)
    longrope.remove(model)
    own = decoder(model).rotary_emb
    with ranges(model):
        assert decoder(model).rotary_emb is not own
    assert decoder(model).rotary_emb is own


@pytest.mark.parametrize("chunk", [None, 20])
def test_the_gradient_is_that_of_the_whole_window(chunk):
    """Against differences of the loss that a whole window under tiers has."""
    model = tiny_models.build().double().requires_grad_(False)
    tiers = tiers_of(model, start_tokens=0)
    window = torch.randint(1, 64, (1, TARGET), generator=torch.Generator().manual_seed(0))
    last = tiers[-1]
    inv_freq = torch.from_numpy(last.inv_freq()).requires_grad_()
    factor = torch.tensor(last.attention_factor, dtype=torch.float64, requires_grad=True)
    score = NextTokenNLL(model, chunk)
    with ranges(model) as rotary:
        with torch.no_grad():
            cache = held_prefix(model, score, rotary, tiers, window, differentiable=True)
        rotary.turn_by(inv_freq, 0, factor)
        loss = score.backward(window, TARGET - MIDDLE - 1, cache)

    def at(**changes):
        changed = longrope.Tiers([*tiers[:-1], last.replace(**changes)])
        return of_windows(model, changed, window).double().sum().item()

    assert loss.item() == pytest.approx(at(), rel=1e-6)
    step = 1e-3
    up, down = (at(attention_factor=last.attention_factor * (1 + s)) for s in (step, -step))
    expected = (up - down) / (2 * step)
    assert factor.grad.item() * last.attention_factor == pytest.approx(expected, rel=2e-2, abs=1e-3)
    for pair in (3, 5):
        lambdas = [last.lambdas.copy() for _ in range(2)]
        lambdas[0][pair] *= 1 + step
        lambdas[1][pair] *= 1 - step
        up, down = (at(lambdas=x) for x in lambdas)
        slope = -(inv_freq.grad * inv_freq.detach())[pair].item()
        assert slope == pytest.approx((up - down) / (2 * step), rel=2e-2, abs=1e-3)
