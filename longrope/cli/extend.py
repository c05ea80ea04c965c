"""`longrope extend`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from longrope._validation import count
from longrope.cli.common import (
    DEVICE,
    READING,
    Data,
    Dtype,
    Model,
    TextField,
    TokenCache,
    TokenDtype,
    in_job,
    one_sentence_errors,
)
from longrope.cli.inputs import has_tiers, load_documents, load_model, rank, say
from longrope.cli.options import takes
from longrope.extension.config import FinetuneConfig
from longrope.runs.options import about

_TRAINING = tuple(option.name for option in dataclasses.fields(FinetuneConfig))


@dataclass(frozen=True, kw_only=True)
class ExtendFlags(FinetuneConfig):
    """What the command can be asked for by flags or in a file, which may hold `[[stages]]` too."""

    target_length: int = field(metadata=about(count, "The window to reach, in tokens."))
    stages: str | list[Any] | None = field(
        default=None,
        metadata=about(
            help="longrope-llama2, longrope-mistral, longrope2, or a TOML file with a table for "
            "each stage; default: by the ratio of the lengths."
        ),
    )

    @classmethod
    def of_run(cls, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the stages of the plan of a run, with its target length and seed."""
        from longrope.extension.plan import recorded_tables

        if not isinstance(asked.get("stages"), dict) or not {"target_length", "seed"} <= set(asked):
            raise ValueError("expected the config.json of a run of longrope extend, got another")
        found = {name: asked[name] for name in ("target_length", "seed")}
        return found | {"stages": recorded_tables(asked["stages"], asked["seed"])}

    @classmethod
    def merged(cls, file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
        """Let flags of fine-tuning win over what a stage of the file says, but for the seed."""
        given = {name: flags[name] for name in _TRAINING if name in flags and name != "seed"}
        stages = file.get("stages")
        if isinstance(stages, list):
            stages = [table | given if _trains(table) else table for table in stages]
            if "bos" in given:  # that of one stage is that of all
                stages = [_without_bos(table) for table in stages]
            file = file | {"stages": stages}
        return file | flags

    def training(self) -> FinetuneConfig:
        """Return what is given of fine-tuning."""
        return FinetuneConfig(**{n: getattr(self, n) for n in _TRAINING if n in self._given})


def _without_bos(table: Any) -> Any:
    if not isinstance(table, Mapping) or _trains(table):
        return table
    return {name: value for name, value in table.items() if name != "bos"}


def _trains(table: Any) -> bool:
    return isinstance(table, Mapping) and table.get("kind") == "finetune"


@one_sentence_errors
@in_job
@takes(ExtendFlags)
def extend(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run resumes there.")],
    options: ExtendFlags,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Train the weights too; default: search alone.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, its memory and time, and end.")
    ] = False,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Text for the table alone (repeatable); default: part of DATA."),
    ] = None,
    test_windows: Annotated[int, typer.Option(help="Windows that the table is measured on.")] = 8,
    text_field: TextField = "text",
    token_dtype: TokenDtype = None,
    token_cache: TokenCache = None,
    resume: Annotated[bool, typer.Option(help="Continue the run found in --out.")] = True,
    device: Annotated[str | None, typer.Option(help=DEVICE, rich_help_panel=READING)] = None,
    dtype: Dtype = "auto",
) -> None:
    """Extend a window: search, fine-tuning, second search, recovery, export, in one run.

    Under torchrun all ranks search and train together.
    """
    import longrope
    from longrope.extension.estimate import estimate, table
    from longrope.extension.run import ExtendArguments, prepared

    training, stages = options.training(), options.stages
    trains = any(map(_trains, stages)) if isinstance(stages, list) else bool(finetune or stages)
    if finetune and not trains:
        raise ValueError("finetune: expected stages of fine-tuning in --options, got none")
    if not trains:
        _refuse_training_options(training)
    network, tokenizer = load_model(model, device, dtype, out if resume else None)
    if has_tiers(model):
        say(
            "MODEL: extended from the one set of its config.json, as a model with a scaling; the "
            "tiers of its longrope.json are for longrope search"
        )
    reading = {
        "text_field": text_field, "token_dtype": token_dtype, "token_cache": token_cache,
    }  # fmt: skip
    documents = load_documents("DATA", data, tokenizer, 2, out=out, **reading)
    test = None
    if held_out:
        test = load_documents("--held-out", held_out, tokenizer, options.target_length, **reading)
    arguments = {
        "target_length": options.target_length,
        "out": out,
        "finetune": training if trains else None,
        "stages": stages,
        "held_out": test,
        "test_windows": test_windows,
        "tokenizer": tokenizer,
        "seed": training.seed or 0,
        "resume": resume,
    }
    if dry_run:
        plan, kept, held = prepared(network, documents, ExtendArguments(**arguments))
        if rank() == 0:
            print(table(network, plan, estimate(network, plan, kept, len(held))))
        return
    result = longrope.extend(network, documents, **arguments)
    if rank() > 0:
        return
    print("Perplexity by range of positions, on text that no stage saw\n")
    print(result.measured.table())
    print(f"\nmodel in {result.folder / 'model'}, tiers in {result.folder / 'tiers.json'}")


def _refuse_training_options(options: FinetuneConfig) -> None:
    """Refuse what a run that trains nothing would silently ignore; its seed is everyone's."""
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if option.name != "seed" and value != option.default:
            raise ValueError(
                f"{option.name}: expected --finetune or --stages with an option of fine-tuning, "
                f"got {value!r} without either"
            )
