"""Models on every device: what works on the CPU works on a GPU, within the tolerance of each."""

from __future__ import annotations

import math

import pytest
import torch
from support import tiny_models

import longrope

HAS_GPU = torch.cuda.is_available() and longrope._C.build_info()["cuda"]
DEVICES = ["cpu", "cuda"] if HAS_GPU else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def documents():
    return list(torch.randint(0, tiny_models.build().config.vocab_size, (3, 300)))


def test_perplexity_is_that_of_the_cpu(device, one_thread):
    text = documents()
    model = longrope.apply(tiny_models.build(), tiny_models.factors("yarn"))
    expected = longrope.perplexity(model, text, length=128, stride=64)
    got = longrope.perplexity(model.to(device), text, length=128, stride=64)
    assert got == pytest.approx(expected, rel=1e-4)


def test_factors_come_along_when_the_model_moves(device, one_thread):
    """Applied before or after the move, the logits are the same."""
    ids = documents()[0][None, :100]
    before = longrope.apply(tiny_models.build(), tiny_models.factors("yarn")).to(device)
    after = longrope.apply(tiny_models.build().to(device), tiny_models.factors("yarn"))
    with torch.no_grad():
        got, expected = (m(ids.to(device)).logits.cpu() for m in (before, after))
    torch.testing.assert_close(got, expected)


def test_search(device, one_thread):
    """The search runs where the model lies and finds factors no worse than YaRN."""
    model, text = tiny_models.build().to(device), documents()
    result = longrope.search(
        model, text, target_length=tiny_models.TARGET, method="evolution", population=6,
        iterations=2, mutations=2, crossovers=2, samples=1, progress=False,
    )  # fmt: skip
    yarn = [e.nll for e in result.history if (e.role, e.origin) == ("validation", "yarn")]
    assert result.validation_perplexity <= math.exp(*yarn) * (1 + 1e-6)


def test_the_reference_turns_keys_again_where_they_are(device):
    """As the op does, from one set of factors to another."""
    positions = torch.arange(9, device=device)
    sets = [tiny_models.factors(rule) for rule in ("pi", "yarn")]
    k = torch.randn(1, 2, 9, sets[0].rotary_dim, device=device)
    expected = longrope.ops.reference.rerotate(k.double(), positions, *sets).float()
    torch.testing.assert_close(longrope.ops.rerotate(k, positions, *sets), expected)
