"""`longrope evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
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
from longrope.cli.inputs import (
    check_factors,
    load_documents,
    load_factors,
    load_model,
    whole_numbers,
)


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
    from longrope.evaluation.suite import check_arguments
    from longrope.evaluation.suite import evaluate as measure
    from longrope.evaluation.suite_report import other_suites

    asked = check_arguments(
        lengths=whole_numbers("--lengths", lengths),
        tasks=[task.strip() for task in tasks.split(",")],
        tiers=tiers, trials=trials, samples=samples, seed=seed,
    )  # fmt: skip
    wanted = asked["lengths"]
    rules = _rules(baselines)
    check_factors(tiers, *(factors or ()))
    network, tokenizer = load_model(model, device, dtype, out if resume else None)
    sets: dict[str, Any] = {}
    for path in factors or ():
        name = path.stem if path.stem not in sets else str(path)
        sets[name] = load_factors(
            path, network, max(wanted), rope_theta=None, attention_factor=None
        )
    for name in rules.keys() & sets.keys():
        raise ValueError(
            f"--baselines: expected names that no file of --factors has, got {name!r} twice; "
            "rename the file"
        )
    sets |= _baselines(network, rules, max(wanted))
    if ladder:
        sets = {name: _by_position(network, each) for name, each in sets.items()}
    documents = load_documents(
        "DATA", data, tokenizer, min(wanted), text_field=text_field, token_dtype=token_dtype,
        token_cache=token_cache, out=out,
    )  # fmt: skip
    result = measure(
        network, documents, tokenizer, factors=sets, out=out, resume=resume, progress=True, **asked
    )
    print(result)
    print(f"\nSaved in {out}. On a folder of longrope export, other suites run by\n"
          f"{other_suites('EXPORTED', wanted)}")  # fmt: skip


def _rules(names: str | None) -> dict[str, Any]:
    """Return the closed forms that `yarn,llama3` names, without a model."""
    from longrope.factors.baselines import BASELINES

    wanted = [part.strip() for part in (names or "").split(",") if part.strip()]
    for name in wanted:
        if name not in BASELINES:
            known = ", ".join(BASELINES)
            raise ValueError(f"--baselines: expected some of {known}, got {name!r}")
    return {name: BASELINES[name] for name in wanted}


def _baselines(network: Any, rules: Mapping[str, Any], target: int) -> dict[str, Any]:
    from longrope.patching import rope_settings

    rope = rope_settings(network)
    if rules and target < rope.original_length:
        raise ValueError(
            f"--lengths: expected one of at least {rope.original_length} with --baselines, the "
            f"window of the model, got at most {target}"
        )
    return {name: make(**rope.lengths(target)) for name, make in rules.items()}


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
