"""The published factor sets that ship in the package."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest

import longrope


def test_all_sets_load():
    names = longrope.published_names()
    assert len(names) == len(set(names)) == 30
    for name in names:
        factors = longrope.factors.published(name)
        assert factors.original_length == 4096 and factors.rope_theta == 10000.0
        assert factors.rotary_dim == 128 and factors.start_tokens == 0
        assert factors.lambdas.min() >= 1.0
        # Slow dimensions of the recovery sets stay where the fine-tuning (32x, 64x) put them.
        assert factors.lambdas.max() <= 1.5 * max(factors.ratio, 64)


@pytest.mark.parametrize(
    "name, target, attention_factor, first",
    [
        ("llama2-7b-2048k-ft256k", 2097152, 1.32288, 1.111799955368042),
        ("llama2-7b-ft128k", 131072, 1.19024, 1.0),
        ("mistral-7b-ft256k", 262144, 1.22474, 1.07),
        ("llama2-7b-4k-ft256k", 4096, 1.0, 1.129999995231628),
    ],
)
def test_settings_of_a_set(name, target, attention_factor, first):
    factors = longrope.factors.published(name)
    assert factors.target_length == target
    assert factors.attention_factor == pytest.approx(attention_factor, abs=5e-6)
    assert factors.lambdas[0] == first


def test_some_sets_break_the_order():
    unordered = [
        name
        for name in longrope.published_names()
        if np.any(np.diff(longrope.factors.published(name).lambdas) < 0)
    ]
    assert any("mistral" in name for name in unordered)


def test_unknown_name_suggests_near_ones():
    with pytest.raises(ValueError, match=r"llama2-7b-2048k-ft256k.*got 'llama2-7b-2048-ft256k'"):
        longrope.factors.published("llama2-7b-2048-ft256k")
    with pytest.raises(ValueError, match=r"published_names\(\)"):
        longrope.factors.published("")


def test_source_and_licence_are_named():
    file = resources.files("longrope") / "data" / "published_factors.json"
    table = json.loads(file.read_text())
    assert "github.com/microsoft/LongRoPE" in table["source"]
    assert table["license"].startswith("MIT")
