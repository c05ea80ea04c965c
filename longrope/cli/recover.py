"""`longrope recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import (
    DEVICE,
    Data,
    Dtype,
    TextField,
    TokenCache,
    TokenDtype,
    one_sentence_errors,
)
from longrope.cli.inputs import (
    choose_device,
    has_tiers,
    load_documents,
    load_extended,
    load_model,
    whole_numbers,
)
from longrope.cli.options import takes
from longrope.extension.config import RecoverOptions


@one_sentence_errors
@takes(RecoverOptions)
def recover(
    model: Annotated[str, typer.Argument(help="Folder of a model that longrope exported.")],
    data: Data,
    lengths: Annotated[
        list[str],
        typer.Option(help="Ends of short tiers in tokens, growing, as in 4096,8192 (repeatable)."),
    ],
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run resumes there.")],
    options: RecoverOptions,
    original: Annotated[
        str | None,
        typer.Option(help="Folder of the model before it was extended, to judge by."),
    ] = None,
    test: Annotated[
        list[Path] | None,
        typer.Option(help="Text to judge on (repeatable); default: part of DATA."),
    ] = None,
    text_field: TextField = "text",
    token_dtype: TokenDtype = None,
    token_cache: TokenCache = None,
    resume: Annotated[bool, typer.Option(help="Continue the run found in --out.")] = True,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    dtype: Dtype = "auto",
) -> None:
    """Search tiers for short texts on an extended model, by search alone."""
    import longrope

    device = choose_device(device)
    wanted = [length for text in lengths for length in whole_numbers("--lengths", text)]
    if not has_tiers(model):
        raise ValueError(
            f"MODEL: expected a folder that longrope extend or export wrote, got {model!r}"
        )
    network, tokenizer = load_extended(model, device, dtype, out if resume else None)
    reading = {
        "text_field": text_field, "token_dtype": token_dtype, "token_cache": token_cache,
    }  # fmt: skip
    judged = None
    if test:
        judged = load_documents("--test", test, tokenizer, wanted[-1], **reading)
    result = longrope.recover(
        network,
        load_documents("DATA", data, tokenizer, wanted[-1], **reading),
        lengths=wanted,
        original=None
        if original is None
        else load_model(original, device, dtype, out if resume else None)[0],
        test=judged,
        out=out,
        resume=resume,
        **vars(options),
    )
    print(result.table())
    print(f"\nweights {result.weights[:16]}, unchanged; tiers in {out / 'tiers.json'}")
