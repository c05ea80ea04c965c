"""`longrope passkey`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import DEVICE, Dtype, Model, Seed, one_sentence_errors
from longrope.cli.inputs import check_factors, load_factors, load_model, whole_numbers


@one_sentence_errors
def passkey(
    model: Model,
    lengths: Annotated[
        str, typer.Option(help="Tokens of a prompt with its answer, as in 4096,8192.")
    ],
    trials: Annotated[int, typer.Option(help="Prompts of each length.")] = 10,
    factors: Annotated[
        Path | None, typer.Option(help="Rescale factors or tiers (.json, .csv) to apply first.")
    ] = None,
    tiers: Annotated[
        str, typer.Option(help="How several sets are chosen from: by position, or by row.")
    ] = "position",
    depths: Annotated[
        int, typer.Option(help="Parts of the filler that keys lie in, in turn; 1: anywhere.")
    ] = 10,
    protocol: Annotated[
        str, typer.Option(help="longrope, or longlora (filler cut between characters).")
    ] = "longrope",
    out: Annotated[
        Path | None, typer.Option(help="Folder for passkey.csv and the heat map passkey.png.")
    ] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure how often a model finds a key of five digits in filler, by length and depth."""
    import longrope
    from longrope.evaluation.passkey import check_arguments
    from longrope.report import at_end
    from longrope.runs import times
    from longrope.runs.folder import write_text

    wanted = whole_numbers("--lengths", lengths)
    check_arguments(wanted, trials, seed, depths, protocol)
    check_factors(tiers, *([factors] if factors else []))
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"--out: cannot write to {out} ({error.strerror})") from None
        times.began(out)
    network, tokenizer = load_model(model, device, dtype)
    if factors is not None:
        sets = load_factors(factors, network, max(wanted), rope_theta=None, attention_factor=None)
        longrope.apply(network, sets, tiers)
    found = longrope.passkey(
        network, tokenizer, lengths=wanted, trials=trials, seed=seed, depths=depths,
        protocol=protocol, progress=True,
    )  # fmt: skip
    print(found)
    if out is not None:
        found.save_csv(out / "passkey.csv")
        found.plot(out / "passkey.png")
        asked = {
            "model": times.place(model), "lengths": wanted, "trials": trials, "seed": seed,
            "depths": depths, "protocol": protocol, "tiers": tiers if factors else None,
            "factors": None if factors is None else times.place(factors),
        }  # fmt: skip
        write_text(out / "passkey.json", json.dumps(asked, indent=1) + "\n")
        at_end(out)
        print(f"Saved: {out / 'passkey.csv'}, {out / 'passkey.png'}, {out / 'report.html'}")
