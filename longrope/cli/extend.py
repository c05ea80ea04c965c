"""`longrope extend`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

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


@one_sentence_errors
@in_job
@takes(FinetuneConfig)
def extend(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run resumes there.")],
    target_length: Annotated[int, typer.Option(help="The window to reach, in tokens.")],
    options: FinetuneConfig,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Train the weights too; default: search alone.")
    ] = False,
    stages: Annotated[
        str | None,
        typer.Option(
            help="longrope-llama2, longrope-mistral, longrope2, or a TOML file with a table for "
            "each stage; default: by the ratio of the lengths."
        ),
    ] = None,
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

    if not (finetune or stages):
        _refuse_training_options(options)
    network, tokenizer = load_model(model, device, dtype, out if resume else None)
    if has_tiers(model):
        say(
            "MODEL: extended from the one set of its config.json, as a model with a scaling; the "
            "tiers of its longrope.json are for longrope search"
        )
    reading = {
        "text_field": text_field, "token_dtype": token_dtype, "token_cache": token_cache,
    }  # fmt: skip
    documents = load_documents("DATA", data, tokenizer, 2, **reading)
    test = None
    if held_out:
        test = load_documents("--held-out", held_out, tokenizer, target_length, **reading)
    arguments = {
        "target_length": target_length,
        "out": out,
        "finetune": options if finetune or stages else None,
        "stages": stages,
        "held_out": test,
        "test_windows": test_windows,
        "tokenizer": tokenizer,
        "seed": options.seed or 0,
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
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name != "seed" and value != field.default:
            raise ValueError(
                f"{field.name}: expected --finetune or --stages with an option of fine-tuning, got "
                f"{value!r} without either"
            )
