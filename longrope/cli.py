"""The `longrope` command. Heavy imports happen inside the commands, so that `--help` is instant.

Bad input ends with one sentence on standard error and exit code 2, without a traceback.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from longrope.cli_inputs import choose_device, load_documents, load_model, rank

app = typer.Typer(
    help="Extend the context window of RoPE language models (LongRoPE, arXiv 2402.13753).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Folder (or hub name) of a Hugging Face model.")]
Data = Annotated[Path, typer.Argument(help="Text file, folder of text, .jsonl or .parquet.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


def one_sentence_errors(command):
    """Turn the errors that bad input raises into one sentence and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, ImportError, NotImplementedError) as error:
            # What all ranks of a job end with is said by the first, and by the one that failed.
            if rank() in (0, getattr(error, "failed_rank", rank())):
                where = f" (rank {rank()})" if rank() else ""
                print(f"longrope{where}: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(2) from None
        except RuntimeError as error:
            if type(error).__name__ != "LostRankError":  # of a module that imports torch
                raise
            print(f"longrope: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            if rank() == 0:
                what = "interrupted"
                if type(error).__name__ == "TerminatedError":  # of a module that imports torch
                    what = "ended by torchrun, as when another rank has failed"
                resumes = "out" in kwargs and (Path(kwargs["out"]) / "journal.jsonl").exists()
                print(f"longrope: {what}" + "; the same command resumes" * resumes, file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped


def in_job(command):
    """Join the job, where torchrun started this process: a command with an option `device`."""

    @functools.wraps(command)
    def wrapped(*args, device, **kwargs):
        from longrope.torchrun import job

        with job(choose_device(device)) as device:
            return command(*args, device=device, **kwargs)

    return wrapped


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@app.command()
@one_sentence_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table, plot and factors.")] = Path(
        "longrope-demo"
    ),
    seed: Seed = 0,
    iterations: Annotated[
        int | None, typer.Option(help="Of Algorithm 1; the default fits two CPU cores.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the search by gradient, likewise.")] = None,
) -> None:
    """Extend the packaged tiny model's window 8x on this Python's own library sources."""
    from longrope.demo.run import run

    run(out, seed=seed, iterations=iterations, steps=steps)


#: Headings of the options of `search` in its help.
PROBLEM, EVOLUTION, DESCENT, MACHINE = (
    "The factors and what they are measured by", "Evolution (Algorithm 1)", "Descent",
    "Run and machine",
)  # fmt: skip


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


@app.command()
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


@app.command()
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


@app.command()
@one_sentence_errors
def info(
    what: Annotated[
        str | None,
        typer.Argument(help="A folder of a model or a search, or factors; default: the build."),
    ] = None,
) -> None:
    """Show what was built, or what a model, a search or a factors file holds."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in _facts(what).items():
        table.add_row(name, str(value))
    Console().print(table)


def _facts(what: str | None) -> dict[str, Any]:
    import longrope

    if what is None:
        import transformers

        facts = {"longrope": longrope.__version__, **longrope._C.build_info()}
        return {**facts, "transformers": transformers.__version__}
    if Path(what).is_file():
        return _facts_of_factors(what)
    from longrope.factor_search.run_directory import FACTORS, JOURNAL, summary

    if (Path(what) / JOURNAL).is_file():
        found = Path(what) / FACTORS
        return summary(Path(what)) | (_facts_of_factors(found) if found.is_file() else {})
    from transformers import AutoConfig

    from longrope.patching import rope_settings

    if not (Path(what) / "config.json").is_file():
        raise ValueError(
            f"WHAT: expected the folder of a model or a search, or factors, got {what!r}"
        )
    return rope_settings(AutoConfig.from_pretrained(what))._asdict()


def _facts_of_factors(path: str | Path) -> dict[str, Any]:
    import longrope

    factors = longrope.RescaleFactors.load(path)
    return {
        "original length": factors.original_length,
        "target length": factors.target_length,
        "start tokens": factors.start_tokens,
        "attention factor": f"{factors.attention_factor:.6g}",
        "rope theta": factors.rope_theta,
        "rotary dim": factors.rotary_dim,
        "lambdas": " ".join(f"{v:g}" for v in factors.lambdas),
    }


def main() -> None:
    """Entry point of the `longrope` command."""
    app()


if __name__ == "__main__":
    main()
