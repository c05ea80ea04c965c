"""`longrope search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import (
    DEVICE,
    Data,
    Dtype,
    Model,
    TextField,
    TokenCache,
    TokenDtype,
    in_job,
    one_sentence_errors,
)
from longrope.cli.inputs import (
    has_tiers,
    load_documents,
    load_extended,
    load_model,
    rank,
    say,
)
from longrope.cli.options import takes
from longrope.factor_search.options import MACHINE, SearchOptions


@one_sentence_errors
@in_job
@takes(SearchOptions)
def search(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run resumes there.")],
    options: SearchOptions,
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            help="Held-out text for the final choice (repeatable); default: part of DATA."
        ),
    ] = None,
    text_field: TextField = "text",
    token_dtype: TokenDtype = None,
    token_cache: TokenCache = None,
    resume: Annotated[
        bool, typer.Option(help="Continue the run found in --out.", rich_help_panel=MACHINE)
    ] = True,
    device: Annotated[str | None, typer.Option(help=DEVICE, rich_help_panel=MACHINE)] = None,
    dtype: Dtype = "auto",
) -> None:
    """Search rescale factors for a longer window; under torchrun on all of its ranks together."""
    import longrope

    if has_tiers(model):
        network, tokenizer = load_extended(model, device, dtype, out if resume else None)
        say("MODEL: the tiers of its longrope.json are stage one (--scaling ignore: from the base)")
    else:
        network, tokenizer = load_model(model, device, dtype, out if resume else None)
    length = options.target_length
    reading = {
        "text_field": text_field, "token_dtype": token_dtype, "token_cache": token_cache,
    }  # fmt: skip
    held_out = None
    if validation:
        held_out = load_documents("--validation", validation, tokenizer, length, **reading)
    result = longrope.search(
        network,
        load_documents("DATA", data, tokenizer, length, out=out, **reading),
        validation=held_out,
        out=out,
        resume=resume,
        **options.as_dict(),
    )
    if rank() > 0:
        return
    yarn = {}  # what a ladder is compared with has tiers of its own
    if not options.ladder:
        yarn = {e.role: e.perplexity for e in result.history if e.origin == "yarn"}
    loaded = {e.role: e.perplexity for e in result.loaded}
    for role, name, reached in (
        ("search", "search", result.perplexity),
        ("validation", "held-out", result.validation_perplexity),
    ):
        if reached is not None:
            compared = f", {yarn[role]:.4f} with YaRN" if role in yarn else ""
            compared += f", {loaded[role]:.4f} as loaded" if role in loaded else ""
            print(f"perplexity {reached:.4f} on the {name} windows{compared}")
    if len(result.stages) > 1:
        first, second = result.stages
        ratio = second.target_length / second.original_length
        print(
            f"the factors are those that the model had, for {first.target_length} tokens, times a "
            f"stage of {ratio:g}x"
        )
    if result.tiers is not None:
        print(result.tiers)
        print(f"tiers in {out / 'tiers.json'}, the last of them alone in {out / 'factors.json'}")
        return
    print(f"start_tokens {result.factors.start_tokens}")
    print(f"factors in {out / 'factors.json'}")
