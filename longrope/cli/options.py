"""Options of a run on the command line: one for each field of a dataclass, or from a file."""

from __future__ import annotations

import dataclasses
import functools
import inspect
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


def takes(kind: type[Options]) -> Callable[[Callable], Callable]:
    """Give a command an option for each field of `kind`, in place of its parameter `options`.

    The command is called with an object of `kind`, made of what `--options FILE` sets and of the
    flags on the command line, which win over the file. An error names the file where the value that
    is at fault is the file's.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}

    def decorate(command):
        own = inspect.signature(command, eval_str=True).parameters
        shown: list[inspect.Parameter] = []
        for name, parameter in own.items():
            if name == "options":
                shown += map(_parameter, fields.values(), _types(kind))
            else:
                shown.append(parameter.replace(kind=_KEYWORD))
        shown.append(inspect.Parameter("options", _KEYWORD, default=None, annotation=File))
        shown.append(inspect.Parameter("context", _KEYWORD, annotation=typer.Context))

        @functools.wraps(command)
        def called(context: typer.Context, options: Path | None = None, **given):
            values = {name: _number(given.pop(name)) for name in fields}
            flags = {
                name: value
                for name, value in values.items()
                if context.get_parameter_source(name).name == "COMMANDLINE"
            }
            from_file = {} if options is None else kind.read(options)
            try:
                return command(options=_made(kind, from_file | flags), **given)
            except ValueError as error:
                name = str(error).partition(":")[0]
                if name in from_file and name not in flags:
                    error.args = (f"{options}: {error}",)
                raise

        called.__signature__ = inspect.Signature(shown)
        called.__annotations__ = {p.name: p.annotation for p in shown}
        return called

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _made(kind: type[Options], given: dict[str, Any]) -> Options:
    try:
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING and field.name not in given:
                raise ValueError(f"{field.name}: expected a value, here or in --options, got none")
        return kind(**given)
    except ValueError as error:
        error.failed_rank = 0  # all ranks were given the same: one of them says it
        raise


def _types(kind: type) -> list[Any]:
    """Return the type of each field on the command line, where a word or a number is text."""
    found = []
    for hint in (typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)):
        kinds = [k for k in typing.get_args(hint) or (hint,) if k is not type(None)]
        found.append(str if str in kinds else kinds[0])
    return found


def _parameter(field: dataclasses.Field, shown: type) -> inspect.Parameter:
    """Return the parameter that typer makes an option of."""
    flag = f"--{field.name.replace('_', '-')}"
    names = (f"{flag}/--no-{flag[2:]}",) if shown is bool else ()
    required = field.default is dataclasses.MISSING  # here or in the file
    about = typer.Option(
        *names,
        help=field.metadata["help"] + " (required)" * required,
        rich_help_panel=field.metadata["heading"],
    )
    default = None if required else field.default
    annotation = Annotated[shown | None, about]
    return inspect.Parameter(field.name, _KEYWORD, default=default, annotation=annotation)


def _number(value: Any) -> Any:
    """Return the number that a text spells, else the text."""
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except ValueError:
            continue
    return value
