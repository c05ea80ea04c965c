"""Options: one dataclass, whether they come as keyword arguments or from a file."""

import dataclasses
import inspect
import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from longrope._validation import count, switch
from longrope.runs.options import Options, about, from_keywords


@dataclass(frozen=True, kw_only=True)
class Baking(Options):
    minutes: int = field(metadata=about(count, "How long.", "Oven"))
    sheets: int | None = field(default=None, metadata=about(count))
    fan: bool = field(default=False, metadata=about(switch))


@from_keywords(Baking)
def bake(model, data, options):
    """Bake."""
    return model, data, options


def test_values_are_checked_and_kept_as_pythons_own():
    options = Baking(minutes=np.int64(20), fan=np.bool_(True))
    assert dataclasses.asdict(options) == {"minutes": 20, "sheets": None, "fan": True}
    assert type(options.minutes) is int and options.fan is True
    with pytest.raises(ValueError, match="minutes: expected an integer of at least 1, got 0"):
        Baking(minutes=0)
    with pytest.raises(ValueError, match="fan: expected True or False, got None"):
        Baking(minutes=1, fan=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.minutes = 3


def test_a_function_takes_them_as_keywords():
    assert bake("m", data="d", minutes=5, fan=True) == ("m", "d", Baking(minutes=5, fan=True))
    shown = inspect.signature(bake).parameters
    assert list(shown) == ["model", "data", "minutes", "sheets", "fan"]
    assert shown["minutes"].default is inspect.Parameter.empty
    assert (shown["sheets"].default, shown["fan"].default) == (None, False)
    assert all(shown[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ("minutes", "fan"))
    assert (bake.__name__, bake.__doc__) == ("bake", "Bake.")
    with pytest.raises(TypeError, match="unexpected keyword argument 'salt'"):
        bake("m", "d", minutes=5, salt=1)
    with pytest.raises(TypeError, match="missing a required argument: 'minutes'"):
        bake("m", "d")


def test_a_file_sets_some_of_them(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text("minutes = 30  # golden\nfan = true\n")
    assert Baking.read(file) == {"minutes": 30, "fan": True}
    file.write_text("")
    assert Baking.read(file) == {}


def test_the_config_of_a_run_gives_them_back(tmp_path):
    asked = Baking(minutes=3, fan=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"seed": 0, "options": dataclasses.asdict(asked)}))
    assert Baking(**Baking.read(file)) == asked


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.toml", "minuets = 3", "{file}: minuets: there is no such option (did you mean minutes"),
        ("a.toml", "[oven]\nfan = true", "{file}: oven: there is no such option"),
        ("a.toml", 'minutes = "3"', "{file}: minutes: expected an integer of at least 1, got '3'"),
        ("a.toml", "fan = 1", "{file}: fan: expected True or False, got 1"),
        ("a.toml", "minutes 3", "{file}: expected TOML, got a file broken at: "),
        ("a.json", "{", "{file}: expected JSON, got a file broken at: "),
        ("a.json", "{}", "{file}: expected the config.json of a run, got "),
        ("a.json", "[]", "{file}: expected the config.json of a run, got "),
        ("a.json", '{"options": 3}', "{file}: expected the config.json of a run, got "),
        ("none.toml", None, "options: cannot read {file} (No such file or directory)"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, name, content, sentence):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError) as raised:
        Baking.read(file)
    assert str(raised.value).startswith(sentence.format(file=file))
    assert "\n" not in str(raised.value)
