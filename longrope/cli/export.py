"""`longrope export`."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from longrope._files import strict_json
from longrope.cli.common import DEVICE, Model, one_sentence_errors
from longrope.cli.inputs import load_documents, load_model, load_weights, naming


@one_sentence_errors
def export(
    model: Model,
    factors: Annotated[Path, typer.Option(help="Rescale factors or tiers (.json) to export.")],
    out: Annotated[Path, typer.Option(help="Folder to write: new, or empty.")],
    short: Annotated[
        str,
        typer.Option(
            help="Factors of sequences within the original window: long (the same for every "
            "length), none (the model as loaded), or a file."
        ),
    ] = "long",
    format: Annotated[
        str, typer.Option(help="hf (transformers, vLLM) or gguf (llama.cpp).")
    ] = "hf",
    gguf_type: Annotated[
        str | None, typer.Option(help="f32, f16, bf16 or q8_0; default: as the model.")
    ] = None,
    drop_start_tokens: Annotated[
        bool,
        typer.Option("--drop-start-tokens", help="Leave out start tokens, which no reader knows."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Documents to measure on, for the model card: what readers lose."),
    ] = None,
    device: Annotated[str | None, typer.Option(help=f"Where to measure: {DEVICE}")] = None,
) -> None:
    """Write a model with factors as a folder that transformers, vLLM or llama.cpp read."""
    import longrope
    from longrope.checkpoints import plan_export
    from longrope.checkpoints.export import check_format, free_folder

    check_format(format, gguf_type)
    with naming("--factors"):
        tiers = longrope.Tiers.load(factors)
    given: Any = tiers if len(tiers) > 1 else tiers[0]
    chosen: Any = short
    if short not in ("long", "none"):
        with naming("--short"):
            chosen = longrope.RescaleFactors.load(short)
    with _calling("path", "--out"):
        free_folder(out)  # before anything is loaded and measured
    measured = None
    if data is not None:
        network, tokenizer = load_model(model, device)
        with _calling("documents", "--data"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, below
            plan_export(network, given, chosen, drop_start_tokens)
            documents = load_documents("--data", data, tokenizer, tiers[-1].target_length)
            measured = longrope.measure_export(
                network, given, documents, short=chosen, data=data.name
            )
        del network
    with _calling("path", "--out"), warnings.catch_warnings(record=True) as said:
        longrope.export(
            load_weights(model),
            out,
            given,
            chosen,
            format,
            drop_start_tokens,
            gguf_type=gguf_type,
            measured=measured,
            found=_found(factors),
        )
    for warning in said:
        print(f"longrope: {warning.message}", file=sys.stderr)
    if measured is not None:
        print(measured.table())
    print(f"{out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


@contextlib.contextmanager
def _calling(argument: str, flag: str) -> Iterator[None]:
    """Call an argument of the library by the command's name of it."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = re.sub(rf"^{argument}(?=(\[\d+\])?: )", flag, str(error))
        if said == str(error):
            raise
        raise type(error)(said) from None


def _found(factors: Path) -> dict[str, Any] | None:
    """Return what a run directory says of how its factors were found; None: no such directory."""
    from longrope.runs.folder import CONFIG, JOURNAL

    config = factors.parent / CONFIG
    if not (factors.parent / JOURNAL).is_file() or not config.is_file():
        return None
    try:
        said = strict_json(config.read_bytes())
        if not isinstance(said, dict):
            raise ValueError("something else than an object")
        stage = _stage_one(said)
    except ValueError as error:
        raise ValueError(f"{config}: expected the config.json of a run, got {error}") from None
    found = {key: said[key] for key in ("model_name", "options", "data") if key in said}
    return found if stage is None else found | {"stage_one": stage}


def _stage_one(config: dict[str, Any]) -> str | None:
    """Return what the factors of a search were found on top of, in words; None: of nothing."""
    from longrope import RescaleFactors
    from longrope.checkpoints.card import on_top_of

    try:
        problem = config.get("problem") or {}
        stage = problem.get("stage")
        if stage is None:
            return None
        lambdas = [float(value) for value in stage["lambdas"]]  # an infinite one is "inf" there
        return on_top_of(RescaleFactors(**stage | {"lambdas": lambdas}), problem["target_length"])
    except (KeyError, TypeError, AttributeError):
        raise ValueError("a stage that is no rescale factors") from None
