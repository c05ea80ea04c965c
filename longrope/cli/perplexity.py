"""`longrope perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import (
    DEVICE,
    Data,
    Dtype,
    Model,
    Seed,
    TextField,
    TokenCache,
    TokenDtype,
    one_sentence_errors,
)
from longrope.cli.inputs import check_factors, load_documents, load_factors, load_model
from longrope.cli.options import value_of


@one_sentence_errors
def perplexity(
    model: Model,
    data: Data,
    length: Annotated[int, typer.Option(help="Window length in tokens.")],
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between the starts of windows; default: 256, or the length if less."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Random documents; default: all.")] = None,
    factors: Annotated[
        Path | None, typer.Option(help="Rescale factors or tiers (.json, .csv) to apply first.")
    ] = None,
    tiers: Annotated[
        str, typer.Option(help="How several sets are chosen from: by position, or by row.")
    ] = "position",
    ranges: Annotated[
        str | None,
        typer.Option(help="Also by range of positions, as in 1-4096,4096-8192 (ends left out)."),
    ] = None,
    rope_theta: Annotated[
        float | None, typer.Option(help="Of factors in a .csv file; default: the model's.")
    ] = None,
    attention_factor: Annotated[
        str | None,
        typer.Option(
            help="Of factors in a .csv file: su (default, as its authors), yarn or a number."
        ),
    ] = None,
    bos: Annotated[
        str,
        typer.Option(
            help="BOS before every window: auto (where the tokenizer adds it), true, "
            "false or a token id."
        ),
    ] = "auto",
    text_field: TextField = "text",
    token_dtype: TokenDtype = None,
    token_cache: TokenCache = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure sliding-window perplexity, each token scored once with the most context."""
    import longrope
    from longrope.evaluation.perplexity import check_arguments

    stride = min(256, length) if stride is None else stride
    pairs = _pairs(ranges)
    check_arguments(length, stride, seed, samples, pairs)
    check_factors(tiers, *([factors] if factors else []))
    network, tokenizer = load_model(model, device, dtype)
    if factors is not None:
        beside = {"rope_theta": rope_theta, "attention_factor": attention_factor}
        longrope.apply(network, load_factors(factors, network, length, **beside), tiers)
    reading = {
        "text_field": text_field, "token_dtype": token_dtype, "token_cache": token_cache,
    }  # fmt: skip
    value = longrope.perplexity(
        network,
        load_documents("DATA", data, tokenizer, length, **reading),
        length=length,
        stride=stride,
        samples=samples,
        seed=seed,
        ranges=pairs,
        bos=value_of(bos, [str, bool, int]),
        progress=True,
    )
    print(f"{value:.4f}")
    for (begin, end), part in zip(pairs, value.by_range, strict=True):
        print(f"{begin}-{end - 1}\t{part:.4f}")


def _pairs(ranges: str | None) -> list[tuple[int, int]]:
    """Return the pairs of positions that `1-4096,4096-8192` names."""
    pairs = []
    for part in ranges.split(",") if ranges else ():
        begin, dash, end = part.strip().partition("-")
        if not (dash and begin.isdigit() and end.isdigit()):
            raise ValueError(f"--ranges: expected ranges like 1-4096,4096-8192, got {ranges!r}")
        pairs.append((int(begin), int(end)))
    return pairs
