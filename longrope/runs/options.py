"""The options of a run: one frozen dataclass, of which everything else is made.

A field is an option: its default, and in its metadata (`about`) the check of its value, its help
text and the heading that it stands under. Keyword arguments of a function (`from_keywords`), a TOML
file (`Options.read`), the command line (`longrope.cli.options`) and the `config.json` of a run
directory are ways to the same object, and none of them repeats the options.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from longrope._files import strict_json

P = ParamSpec("P")
Model = TypeVar("Model")
Data = TypeVar("Data")
Asked = TypeVar("Asked")
Result = TypeVar("Result")


def about(
    check: Callable[[str, Any], Any] | None = None, help: str = "", heading: str | None = None
) -> dict[str, Any]:
    """Return the metadata of a field of `Options`.

    Parameters
    ----------
    check
        Called with the option's name and value; returns the value as Python's own number or string,
        or raises `ValueError`. Never called with the None of an option whose default that is.
    help
        One line for the command line.
    heading
        What the help lists the option under.
    """
    return {"check": check, "help": help, "heading": heading}


@dataclass(frozen=True)
class Options:
    """Base class of options; every value is checked when an object is made."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _checked(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # the way into a frozen dataclass

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """Return what a file sets: TOML, or the `config.json` of a run, by the options' names.

        Raises `ValueError` with one sentence that names the file and the key.
        """
        path = Path(path)
        config = path.suffix == ".json"
        try:
            text = path.read_text(encoding="utf-8")
            content = strict_json(text) if config else tomllib.loads(text)
        except OSError as error:
            raise ValueError(f"options: cannot read {path} ({error.strerror})") from None
        except RecursionError:
            raise ValueError(f"{path}: expected options, got values nested too deeply") from None
        except ValueError as error:  # of the encoding, JSON or TOML
            kind = "JSON" if config else "TOML"
            raise ValueError(f"{path}: expected {kind}, got a file broken at: {error}") from None
        if config:
            content = content.get("options") if isinstance(content, dict) else None
            if not isinstance(content, dict):
                raise ValueError(f"{path}: expected the config.json of a run, got no options")
            try:
                content = cls.of_run(content)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key, value in content.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                meant = f" (did you mean {near[0]}?)" if near else ""
                named = key if key.isidentifier() and len(key) <= 40 else repr(key[:40])
                raise ValueError(f"{path}: {named}: there is no such option{meant}")
            try:
                _checked(known[key], value)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return content

    @classmethod
    def of_run(cls, asked: dict[str, Any]) -> dict[str, Any]:
        """Return by name the options of a run whose `config.json` has `asked` under "options".

        Raises `ValueError`, without the name of the file, for what a run of another kind has there.
        """
        return asked

    @classmethod
    def merged(cls, file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
        """Return what a file and the flags beside it set together; flags win."""
        return file | flags


def _checked(field: dataclasses.Field, value: Any) -> Any:
    check = field.metadata.get("check")
    return value if check is None or value is field.default is None else check(field.name, value)


def from_keywords(
    kind: Callable[P, Asked],
) -> Callable[
    [Callable[[Model, Data, Asked], Result]], Callable[Concatenate[Model, Data, P], Result]
]:
    """Let a function of a model, data and options take the options as keyword arguments.

    Its signature then shows each of them with its default, in `help`, to `inspect` and to type
    checkers.
    """

    def decorate(function):
        model, data, _ = inspect.signature(function).parameters.values()
        signature = inspect.signature(function).replace(
            parameters=[model, data, *inspect.signature(kind).parameters.values()]
        )

        @functools.wraps(function)
        def called(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            first = [given.pop(name) for name in (model.name, data.name)]
            return function(*first, kind(**given))

        called.__signature__ = signature
        return called

    return decorate
