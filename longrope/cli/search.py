"""`longrope search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longrope.cli.common import Data, Model, Seed, in_job, one_sentence_errors
from longrope.cli.inputs import load_documents, load_model, rank

#: Headings of the options of `search` in its help.
PROBLEM, EVOLUTION, DESCENT, MACHINE = (
    "The factors and what they are measured by", "Evolution (Algorithm 1)", "Descent",
    "Run and machine",
)  # fmt: skip


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


@one_sentence_errors
@in_job
def search(
    model: Model,
    data: Data,
    target_length: Annotated[int, typer.Option(help="The window to reach, in tokens.")],
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run resumes there.")],
    method: Annotated[
        str,
        typer.Option(help="gradient (fast), evolution (Algorithm 1 of the paper) or hybrid."),
    ] = "gradient",
    preset: Annotated[
        str, typer.Option(help="Settings: paper, paper-long (above 512k) or official-code.")
    ] = "paper",
    validation: Annotated[
        Path | None, typer.Option(help="Held-out text for the final choice; default: part of DATA.")
    ] = None,
    seed: Seed = 0,
    objective: Annotated[
        str, _option(PROBLEM, "perplexity, or needle: the loss of answers far from their needle.")
    ] = "perplexity",
    last_tokens: Annotated[
        int | None, _option(PROBLEM, "Score only so many tokens at the end of each window.")
    ] = None,
    samples: Annotated[int | None, _option(PROBLEM, "Search windows (paper: 5).")] = None,
    original_length: Annotated[
        int | None, _option(PROBLEM, "The window of the model; default: what its config says.")
    ] = None,
    start_tokens: Annotated[str, _option(PROBLEM, 'A number, or "search".')] = "search",
    attention_factor: Annotated[
        str | None,
        _option(PROBLEM, '"yarn", "su", a number, or "search" (default of gradient and hybrid).'),
    ] = None,
    max_lambda: Annotated[
        float | None, _option(PROBLEM, "Upper bound of the factors (paper: 1.25 s).")
    ] = None,
    critical_dimension: Annotated[
        bool,
        _option(PROBLEM, "Search from a critical pair on (LongRoPE2).", "--critical-dimension"),
    ] = False,
    iterations: Annotated[
        int | None, _option(EVOLUTION, "Generations (paper: 40, hybrid: 5).")
    ] = None,
    population: Annotated[
        int | None, _option(EVOLUTION, "Candidates of the first one (paper: 64, hybrid: 16).")
    ] = None,
    mutations: Annotated[
        int | None, _option(EVOLUTION, "New ones of each later one (paper: 16, hybrid: 8).")
    ] = None,
    crossovers: Annotated[
        int | None, _option(EVOLUTION, "Likewise (paper: 16, hybrid: 8).")
    ] = None,
    mutation_probability: Annotated[
        float | None, _option(EVOLUTION, "For each dimension of a mutation (0.3).")
    ] = None,
    parents: Annotated[
        int | None, _option(EVOLUTION, "Candidates that survive (paper: 32, hybrid: 8).")
    ] = None,
    max_evaluations: Annotated[
        int | None, _option(EVOLUTION, "Stop after so many candidates.")
    ] = None,
    race: Annotated[
        bool, _option(EVOLUTION, "Drop clearly worse candidates after a few windows.", "--race")
    ] = False,
    steps: Annotated[int | None, _option(DESCENT, "Steps (80).")] = None,
    learning_rate: Annotated[
        float | None, _option(DESCENT, "Learning rate at its begin (0.05).")
    ] = None,
    windows_per_step: Annotated[int | None, _option(DESCENT, "Random windows (1).")] = None,
    activation_checkpointing: Annotated[
        bool | None,
        _option(
            DESCENT,
            "Go backwards in chunks, in less memory; default: where it is short.",
            "--activation-checkpointing/--no-activation-checkpointing",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, _option(MACHINE, "Windows of one forward pass; default: by free memory.")
    ] = None,
    shard_sequence: Annotated[
        bool, _option(MACHINE, "Spread each window over the ranks of torchrun (evolution).")
    ] = False,
    resume: Annotated[bool, _option(MACHINE, "Continue the run found in --out.")] = True,
    device: Annotated[str | None, _option(MACHINE, "cpu or cuda; default: what is there.")] = None,
) -> None:
    """Search rescale factors for a longer window; under torchrun on all of its ranks together."""
    import longrope

    network, tokenizer = load_model(model, device)
    held_out = None
    if validation is not None:
        held_out = load_documents("--validation", validation, tokenizer, target_length)
    result = longrope.search(
        network,
        load_documents("DATA", data, tokenizer, target_length),
        target_length=target_length,
        out=out,
        method=method,
        preset=preset,
        validation=held_out,
        seed=seed,
        objective=objective,
        last_tokens=last_tokens,
        samples=samples,
        original_length=original_length,
        start_tokens=_number("--start-tokens", start_tokens, ("search",), int),
        attention_factor=None
        if attention_factor is None
        else _number("--attention-factor", attention_factor, ("yarn", "su", "search"), float),
        max_lambda=max_lambda,
        critical_dimension=critical_dimension,
        iterations=iterations,
        population=population,
        mutations=mutations,
        crossovers=crossovers,
        mutation_probability=mutation_probability,
        parents=parents,
        max_evaluations=max_evaluations,
        race=race,
        steps=steps,
        learning_rate=learning_rate,
        windows_per_step=windows_per_step,
        activation_checkpointing=activation_checkpointing,
        batch_size=batch_size,
        shard_sequence=shard_sequence,
        resume=resume,
        progress=True,
    )
    if rank() > 0:
        return
    yarn = {e.role: e.perplexity for e in result.history if e.origin == "yarn"}
    for role, name, reached in (
        ("search", "search", result.perplexity),
        ("validation", "held-out", result.validation_perplexity),
    ):
        if reached is not None:
            beside = f", {yarn[role]:.4f} with YaRN" if role in yarn else ""
            print(f"perplexity {reached:.4f} on the {name} windows{beside}")
    print(f"start_tokens {result.factors.start_tokens}")
    print(f"factors in {out / 'factors.json'}")


def _number(name: str, text: str, words: tuple[str, ...], kind: type) -> Any:
    """Return `text` where it is one of the option's words, else the number it spells."""
    if text in words:
        return text
    try:
        return kind(text)
    except ValueError:
        expected = ", ".join([*words, "a whole number" if kind is int else "a number"])
        raise ValueError(f"{name}: expected one of {expected}, got {text!r}") from None
