"""`longrope evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
from longrope.cli.inputs import load_documents, load_factors, load_model, whole_numbers


@one_sentence_errors
def evaluate(
    model: Model,
    data: Data,
    lengths: Annotated[str, typer.Option(help="Windows and prompts in tokens, as in 4096,8192.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run resumes there.")],
    tasks: Annotated[
        str, typer.Option(help="Some of perplexity, passkey, ruler, longppl, with commas between.")
    ] = "perplexity,passkey",
    factors: Annotated[
        list[Path] | None,
        typer.Option(help="Rescale factors or tiers to measure (repeatable; .json, .csv)."),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Rules without a search to measure for the longest length: some of pi, ntk, "
            "dynamic-ntk, yarn, llama3, mrrope-uni, mrrope-pro, cope."
        ),
    ] = None,
    ladder: Annotated[
        bool,
        typer.Option(help="Make tiers by position of single sets, from the model as loaded."),
    ] = False,
    tiers: Annotated[
        str, typer.Option(help="How several sets are chosen from: by position, or by row.")
    ] = "position",
    trials: Annotated[int, typer.Option(help="Passkey prompts of each length.")] = 20,
    samples: Annotated[int, typer.Option(help="RULER prompts of each task and length.")] = 20,
    text_field: TextField = "text",
    token_dtype: TokenDtype = None,
    token_cache: TokenCache = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option(help="Continue the run found in --out.")] = True,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure a model as loaded and under each set of factors: one table, plots, resumable."""
    from longrope.evaluation.suite import evaluate as measure
    from longrope.evaluation.suite_report import other_suites

    wanted = whole_numbers("--lengths", lengths)
    network, tokenizer = load_model(model, device, dtype, out if resume else None)
    sets: dict[str, Any] = {}
    for path in factors or ():
        name = path.stem if path.stem not in sets else str(path)
        sets[name] = load_factors(
            path, network, max(wanted), rope_theta=None, attention_factor=None
        )
    rules = _baselines(network, baselines, max(wanted))
    for name in rules.keys() & sets.keys():
        raise ValueError(
            f"--baselines: expected names that no file of --factors has, got {name!r} twice; "
            "rename the file"
        )
    sets |= rules
    if ladder:
        sets = {name: _by_position(network, each) for name, each in sets.items()}
    documents = load_documents(
        "DATA", data, tokenizer, min(wanted), text_field=text_field, token_dtype=token_dtype,
        token_cache=token_cache,
    )  # fmt: skip
    result = measure(
        network, documents, tokenizer, lengths=wanted, factors=sets, out=out,
        tasks=[task.strip() for task in tasks.split(",")], trials=trials, samples=samples,
        seed=seed, tiers=tiers, resume=resume, progress=True,
    )  # fmt: skip
    print(result)
    print(f"\nSaved in {out}. On a folder of longrope export, other suites run by\n"
          f"{other_suites('EXPORTED', wanted)}")  # fmt: skip


def _baselines(network: Any, names: str | None, target: int) -> dict[str, Any]:
    from longrope.factors.baselines import BASELINES
    from longrope.patching import rope_settings

    made = {}
    window = rope_settings(network).original_length
    if names and target < window:
        raise ValueError(
            f"--lengths: expected one of at least {window} with --baselines, the window of the "
            f"model, got at most {target}"
        )
    for name in (part.strip() for part in (names or "").split(",") if part.strip()):
        if name not in BASELINES:
            known = ", ".join(BASELINES)
            raise ValueError(f"--baselines: expected some of {known}, got {name!r}")
        made[name] = BASELINES[name](**rope_settings(network).lengths(target))
    return made


def _by_position(network: Any, factors: Any) -> Any:
    """Return the tiers from the model as loaded to a single set; tiers as they are."""
    import numpy as np

    from longrope import RescaleFactors, Tiers
    from longrope.patching import rope_settings

    several = [factors] if isinstance(factors, RescaleFactors) else list(factors)
    if len(several) > 1:
        return factors
    loaded = rope_settings(network).loaded
    if loaded is None:
        raise ValueError(
            "--ladder: expected a model whose own scaling does not depend on the length, got one "
            "of type dynamic"
        )
    if np.isfinite(several[0].lambdas).all():
        return several[0].ladder(loaded=loaded)
    return Tiers([loaded, several[0]])  # between it and a pair that stops is no geometric way
