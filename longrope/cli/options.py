"""Options of a run on the command line: one for each field of a dataclass, or from a file."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from longrope.runs.options import Options

File = Annotated[
    Path | None,
    typer.Option(help="TOML file of options, or the config.json of a run; flags win over it."),
]


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def takes(kind: type[Options]) -> Callable[[Callable], Callable]:
    """Give a command an option for each field of `kind`, in place of its parameter `options`.

    The command is called with an object of `kind`, made of what `--options FILE` sets and of the
    flags on the command line, which win over the file. An error that is about a value of the file
    names the file.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: (field, hints[field.name]) for field in dataclasses.fields(kind)}

    def decorate(command):
        shown: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            if name == "options":
                shown += [_parameter(*field) for field in fields.values()]
            else:
                shown.append(parameter.replace(kind=_KEYWORD))
        shown.append(inspect.Parameter("options", _KEYWORD, default=None, annotation=File))
        shown.append(inspect.Parameter("context", _KEYWORD, annotation=typer.Context))

        @functools.wraps(command)
        def called(context: typer.Context, options: Path | None = None, **given):
            flags = {}
            for name, (_, hint) in fields.items():
                value = given.pop(name)
                if context.get_parameter_source(name).name == "COMMANDLINE":
                    flags[name] = value_of(value, _types(hint))
            from_file = {} if options is None else kind.read(options)
            try:
                return command(options=_made(kind, kind.merged(from_file, flags)), **given)
            except ValueError as error:
                name = re.match(r"\w*", str(error))[0]
                if name in from_file and name not in flags:
                    error.args = (f"{options}: {error}",)
                raise

        called.__signature__ = inspect.Signature(shown)
        called.__annotations__ = {p.name: p.annotation for p in shown}
        return called

    return decorate


def _made(kind: type[Options], given: dict[str, Any]) -> Options:
    try:
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING and field.name not in given:
                raise ValueError(f"{field.name}: expected a value, here or in --options, got none")
        return kind(**given)
    except ValueError as error:
        error.failed_rank = 0  # all ranks were given the same: one of them says it
        raise


def _types(hint: Any) -> list[type]:
    """Return the types that a hint such as `str | int | None` names, without None."""
    several = typing.get_args(hint) if typing.get_origin(hint) is not list else ()
    return [kind for kind in several or (hint,) if kind is not type(None)]


def _parameter(field: dataclasses.Field, hint: Any) -> inspect.Parameter:
    """Return the parameter that typer makes an option of; a word or a number is text."""
    kind = str if str in _types(hint) else _types(hint)[0]
    flag = f"--{field.name.replace('_', '-')}"
    required = field.default is dataclasses.MISSING  # here or in the file
    about = typer.Option(
        *((f"{flag}/--no-{flag[2:]}",) if kind is bool else ()),
        help=field.metadata["help"] + " (required)" * required,
        rich_help_panel=field.metadata["heading"],
    )
    default = None if required else field.default
    annotation = Annotated[kind | None, about]
    return inspect.Parameter(field.name, _KEYWORD, default=default, annotation=annotation)


def value_of(text: Any, kinds: list[type]) -> Any:
    """Return the number or the truth that a text spells, if an option can be one; else the text."""
    if bool in kinds and str in kinds and text in ("true", "false"):
        return text == "true"
    for kind in (int, float) if str in kinds and {int, float} & set(kinds) else ():
        try:
            return kind(text)
        except ValueError:
            continue
    return text
