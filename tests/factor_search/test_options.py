"""The options of a search: the one list of them, what follows from them, what does not fit."""

import dataclasses
import inspect
import json

import numpy as np
import pytest

import longrope
from longrope.factor_search.evolution import EvolutionSettings
from longrope.factor_search.history import Evaluation, Role
from longrope.factor_search.options import HYBRID_SIZES, SearchOptions
from longrope.factor_search.run import SearchArguments

FIELDS = {field.name: field for field in dataclasses.fields(SearchOptions)}


def test_the_function_has_them_all_and_explains_them():
    shown = inspect.signature(longrope.search).parameters
    arguments = [field.name for field in dataclasses.fields(SearchArguments)]
    assert list(shown) == ["model", "documents", *arguments]
    explained = longrope.search.__doc__
    for name, field in FIELDS.items():
        assert field.metadata["help"] and field.metadata["check"], name
        assert f"    {name}\n" in explained or f"{name}," in explained or f", {name}" in explained
        required = field.default is dataclasses.MISSING
        assert shown[name].default is (inspect.Parameter.empty if required else field.default)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"method": "evolution", "population": np.int64(9), "race": np.bool_(True)},
        {"method": "hybrid", "start_tokens": 3, "attention_factor": 1, "max_lambda": 2},
        {"attention_factor": "su", "learning_rate": np.float32(0.5), "preset": "official-code"},
    ],
)
def test_a_config_brings_them_back(given):
    options = SearchOptions(target_length=64, **given)
    kept = json.loads(json.dumps(options.as_dict()))
    assert SearchOptions(**kept) == options
    assert set(kept) == set(FIELDS)
    arguments = SearchArguments(target_length=64, **given, validation=[[1]], out="x", resume=False)
    assert arguments.as_dict() == options.as_dict()


def test_sizes_are_those_given_and_else_the_methods():
    def sizes(**given):
        return SearchOptions(target_length=64, **given).sizes

    assert sizes(method="evolution") == EvolutionSettings()
    assert sizes(method="hybrid") == HYBRID_SIZES
    assert sizes(method="hybrid", parents=3) == dataclasses.replace(HYBRID_SIZES, parents=3)
    assert sizes(method="evolution", preset="paper-long").population == 32
    assert SearchOptions(target_length=64, steps=3).descent.steps == 3
    assert SearchOptions(target_length=64, preset="paper-long").windows == 3
    assert SearchOptions(target_length=64, preset="paper-long", samples=4).windows == 4


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"start_tokens": 64}, "start_tokens: expected less than the target length 64, got 64"),
        ({"last_tokens": 64}, "last_tokens: expected less than the target length 64, got 64"),
        ({"objective": "needle", "last_tokens": 3}, "last_tokens: expected None with objective="),
        ({"start_tokens": True}, "start_tokens: expected 'search' or an integer of at least 0"),
        ({"attention_factor": True}, "attention_factor: expected 'yarn', 'su', 'search' or a pos"),
        ({"method": ["gradient"]}, "method: expected one of 'evolution', 'gradient', 'hybrid', go"),
        ({"shard_sequence": True}, "shard_sequence: expected False with method='gradient', whose"),
    ],
)
def test_what_does_not_fit_is_one_sentence(given, sentence):
    with pytest.raises(ValueError) as raised:
        SearchOptions(target_length=64, **given)
    assert str(raised.value).startswith(sentence)


def test_a_role_is_its_string_wherever_it_is_written():
    assert Role.SEARCH == "search" and {Role.SEARCH: 1}["search"] == 1
    assert f"{Role.SEARCH} {Role.SEARCH:>7} {Role.RACE!s}" == "search  search race"
    done = Evaluation(Role.GRADIENT, 0, "gradient", (1.0,), 0, 1.0, 1.0, 2)
    assert json.loads(json.dumps(dataclasses.asdict(done)))["role"] == "gradient"
    assert done.forward_equivalents == 6
