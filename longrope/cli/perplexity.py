"""`longrope perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import DEVICE, Data, Model, Seed, one_sentence_errors
from longrope.cli.inputs import load_documents, load_model


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
        Path | None, typer.Option(help="Rescale factors (.json) to apply first.")
    ] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
) -> None:
    """Measure sliding-window perplexity, each token scored once with the most context."""
    import longrope

    rescale = longrope.RescaleFactors.load(factors) if factors else None
    network, tokenizer = load_model(model, device)
    if rescale is not None:
        longrope.apply(network, rescale)
    value = longrope.perplexity(
        network,
        load_documents("DATA", data, tokenizer, length),
        length=length,
        stride=min(256, length) if stride is None else stride,
        samples=samples,
        seed=seed,
    )
    print(f"{value:.4f}")
