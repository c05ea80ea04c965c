"""`longrope perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import Data, Model, Seed, one_sentence_errors
from longrope.cli.inputs import load_model


@one_sentence_errors
def perplexity(
    model: Model,
    data: Data,
    length: Annotated[int, typer.Option(help="Window length in tokens.")],
    stride: Annotated[
        int | None, typer.Option(help="Tokens between the starts of windows, 256 or the length.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Random documents; default: all.")] = None,
    factors: Annotated[
        Path | None, typer.Option(help="Rescale factors (.json) to apply first.")
    ] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: what is there.")] = None,
) -> None:
    """Measure sliding-window perplexity, each token scored once with the most context."""
    import longrope

    rescale = longrope.RescaleFactors.load(factors) if factors else None
    network, tokenizer = load_model(model, device)
    if rescale is not None:
        longrope.apply(network, rescale)
    value = longrope.perplexity(
        network,
        longrope.load_data(data, tokenizer=tokenizer),
        length=length,
        stride=min(256, length) if stride is None else stride,
        samples=samples,
        seed=seed,
    )
    print(f"{value:.4f}")
