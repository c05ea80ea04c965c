"""`longrope recover`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from longrope._validation import integer
from longrope.cli.common import (
    DEVICE,
    Data,
    Dtype,
    TextField,
    TokenCache,
    TokenDtype,
    one_sentence_errors,
)
from longrope.cli.folders import checked_model
from longrope.cli.inputs import (
    choose_device,
    has_tiers,
    load_documents,
    load_extended,
    load_weights,
    on_device,
    whole_numbers,
)
from longrope.cli.options import takes
from longrope.extension.config import RecoverOptions
from longrope.runs.options import about


def _lengths(name: str, value: Any) -> list[int]:
    """Return the lengths of a list from a file, or of one from flags, where each may be several."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}: expected a list of lengths, got {value!r}")
    parts = [whole_numbers(name, part) if isinstance(part, str) else [part] for part in value]
    return [integer(name, length, 4) for part in parts for length in part]


@dataclass(frozen=True, kw_only=True)
class RecoverFlags(RecoverOptions):
    """What the command can be asked for by flags or in a file."""

    lengths: list[str] | list[int] = field(
        metadata=about(
            _lengths, "Ends of short tiers in tokens, growing, as in 4096,8192 (repeatable)."
        )
    )

    @classmethod
    def of_run(cls, asked: dict[str, Any]) -> dict[str, Any]:
        """Return what a recovery was asked for, of all that must be the same to resume it."""
        if "lengths" not in asked:
            raise ValueError("expected the config.json of a run of longrope recover, got another")
        found = {name: asked[name] for name in cls.__dataclass_fields__ if name in asked}
        if found.get("bos", "auto") is None:  # what a run without one has noted
            found["bos"] = False
        return found


@one_sentence_errors
@takes(RecoverFlags)
def recover(
    model: Annotated[str, typer.Argument(help="Folder of a model that longrope exported.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run resumes there.")],
    options: RecoverFlags,
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
    if not has_tiers(model):
        raise ValueError(
            f"MODEL: expected a folder that longrope extend or export wrote, got {model!r}"
        )
    begun = out if resume else None
    if original is not None:
        checked_model("--original", original)
    network, tokenizer = load_extended(model, device, dtype, begun)
    before = None
    if original is not None:
        before = on_device(load_weights(original, "--original"), device, dtype, begun, "--original")
    reading = {
        "text_field": text_field, "token_dtype": token_dtype, "token_cache": token_cache,
    }  # fmt: skip
    judged = None
    if test:
        judged = load_documents("--test", test, tokenizer, options.lengths[-1], **reading)
    result = longrope.recover(
        network,
        load_documents("DATA", data, tokenizer, options.lengths[-1], out=out, **reading),
        original=before,
        test=judged,
        out=out,
        resume=resume,
        **vars(options),
    )
    print(result.table())
    print(f"\nweights {result.weights[:16]}, unchanged; tiers in {out / 'tiers.json'}")
