"""CSV files of the official search, and factor files that mean harm."""

import json
import math
import warnings

import numpy as np
import pytest

from longrope import RescaleFactors, Tiers, su_attention_factor, yarn_attention_factor

LAMBDAS = np.concatenate([np.ones(20), np.geomspace(1.06, 8, 24), np.full(20, 8.0)])


@pytest.fixture
def csv(tmp_path):
    def write(*leading, lambdas=LAMBDAS, layers=1):
        path = tmp_path / "result.csv"
        row = np.r_[leading, lambdas] if leading else lambdas
        if layers == 1:
            np.savetxt(path, row)
        else:
            np.savetxt(path, np.tile(row, (layers, 1)), delimiter=",")
        return path

    return write


def quiet(path, **settings):
    return RescaleFactors.load(path, **({"attention_factor": 1.0} | settings))


@pytest.mark.parametrize("layers", [1, 32])
@pytest.mark.parametrize("pairs", [16, 32, 64])
@pytest.mark.parametrize("leading", [(), (0,), (1,), (16,), (256,), (3, 9), (0, 16)])
def test_the_layouts_are_told_apart(csv, leading, pairs, layers):
    lambdas = np.linspace(1, 8, pairs)
    path = csv(*leading, lambdas=lambdas, layers=layers)
    for settings in ({}, {"rotary_dim": 2 * pairs}):
        factors = quiet(path, **settings)
        assert factors.lambdas.tolist() == lambdas.tolist()
        assert factors.start_tokens == (leading[0] if len(leading) == 1 else 0)


def test_numbers_of_factors_that_are_no_multiple_of_eight(csv):
    lambdas = np.linspace(1, 8, 12)
    assert quiet(csv(lambdas=lambdas)).rotary_dim == 24
    assert quiet(csv(16, lambdas=lambdas)).start_tokens == 16
    assert quiet(csv(0, lambdas=lambdas)).rotary_dim == 24
    # A 1 may be a factor too: only the rotary dimension tells.
    assert quiet(csv(1, lambdas=lambdas)).rotary_dim == 26
    assert quiet(csv(1, lambdas=lambdas), rotary_dim=24).start_tokens == 1


def test_what_is_said_beside_a_file(csv):
    path = csv(16)
    lengths = {"original_length": 8192, "target_length": 65536, "rope_theta": 5e5}
    for rule, expected in (
        ("su", su_attention_factor(8, 8192)),
        ("yarn", yarn_attention_factor(8)),
        (1.5, 1.5),
    ):
        factors = RescaleFactors.load(path, attention_factor=rule, **lengths)
        assert factors.attention_factor == expected
        assert (factors.rope_theta, factors.ratio) == (5e5, 8)
    with pytest.raises(ValueError, match=r"attention_factor: expected one of 'su', 'yarn', got"):
        RescaleFactors.load(path, attention_factor="none")
    with pytest.raises(ValueError, match=r"start_tokens: expected 16, .* got 4"):
        quiet(path, start_tokens=4)
    with pytest.raises(ValueError, match=r"rotary_dim: expected an even number"):
        quiet(path, rotary_dim=7)


def test_an_attention_factor_that_nobody_stated_is_said(csv):
    with pytest.warns(UserWarning, match=r"states no attention factor, 1\.0 is taken"):
        assert RescaleFactors.load(csv()).attention_factor == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RescaleFactors.load(csv(), attention_factor="su")


DIGITS = "9" * 400


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,0\n1,25\n", "expected numbers with a decimal point on line 1, got '1,0'"),
        ("1,0;1,25;2,5\n", "expected numbers with a decimal point on line 1"),
        ("1,0 1,25\n", "expected numbers with a decimal point on line 1"),
        (f"1.0\n{DIGITS}\n", "expected numbers on line 2"),
        ("1.0\n1e999\n", "expected numbers on line 2"),
        ("inf\nnan\n", "got nan at index 1"),
        ("[1.0, 2.0]", "expected numbers on line 1"),
        ("[" * 100_000, "expected numbers on line 1"),
    ],
)
def test_a_hostile_csv_gets_one_sentence(tmp_path, text, said):
    path = tmp_path / "f.csv"
    path.write_text(text)
    for load in (quiet, Tiers.load):
        with pytest.raises(ValueError) as raised:
            load(path)
        assert said in str(raised.value) and "\n" not in str(raised.value)
        assert len(str(raised.value)) < 400


def replaced(name, value):
    return lambda text: json.dumps(json.loads(text) | {name: "HERE"}).replace('"HERE"', value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replaced("lambdas", f"[1, {DIGITS}]"), "a number of 400 digits"),
        (replaced("lambdas", f"[1.0, {DIGITS}.0]"), "a number that is not finite"),
        (replaced("lambdas", "[1.0, NaN]"), "a number that is not finite, NaN"),
        (replaced("lambdas", "[1.0, null]"), "lambdas: expected a list of numbers"),
        (replaced("lambdas", "[1.0, true]"), "lambdas: expected a list of numbers"),
        (replaced("lambdas", "[[1.0], [2.0]]"), "lambdas: expected 2 positive values"),
        (replaced("lambdas", '{"0": 1.0}'), "lambdas: expected a list of numbers"),
        (replaced("target_length", DIGITS), "a number of 400 digits"),
        (replaced("attention_factor", "1e999"), "a number that is not finite"),
        (replaced("rope_theta", "[]"), "rope_theta: expected a finite number above 1, got []"),
        (replaced("start_tokens", '{"a": 1}'), "start_tokens: expected an integer"),
        (replaced("lambdas", "[" * 100_000 + "]" * 100_000), "nested too deeply"),
        (lambda text: text.replace('"lambdas"', '"rope_theta": 5.0, "lambdas"'), "stands there tw"),
        (lambda text: '{"format": "longrope-tiers", "version": 1, "tiers": [[1.0, 2.0]]}',
         "missing"),
    ],
)  # fmt: skip
def test_a_hostile_json_file_gets_one_sentence(tmp_path, change, said):
    path = tmp_path / "f.json"
    RescaleFactors([1.0, 2.0], rotary_dim=4).save(path)
    path.write_text(change(path.read_text()))
    for load in (RescaleFactors.load, Tiers.load):
        with pytest.raises(ValueError) as raised:
            load(path)
        assert said in str(raised.value) and "\n" not in str(raised.value)
        assert str(path) in str(raised.value) and len(str(raised.value)) < 400


def test_numbers_beyond_floats_are_refused_without_a_file():
    with pytest.raises(ValueError, match=r"lambdas: .* a number that overflows float64"):
        RescaleFactors([1.0, int(DIGITS)], rotary_dim=4)
    with pytest.raises(ValueError, match=r"attention_factor: .* more than 40 digits"):
        RescaleFactors([1.0, 2.0], rotary_dim=4, attention_factor=int(DIGITS))
    assert RescaleFactors([1.0, math.inf], rotary_dim=4).lambdas[1] == math.inf
