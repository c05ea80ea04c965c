"""`longrope info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longrope.cli.common import one_sentence_errors
from longrope.cli.folders import check_config


@one_sentence_errors
def info(
    what: Annotated[
        str | None,
        typer.Argument(help="A folder of a model or a run, or factors; default: the build."),
    ] = None,
    runtime: Annotated[
        bool,
        typer.Option("--runtime", help="Of a model: the attention, cache and device it takes."),
    ] = False,
) -> None:
    """Show what was built, or what a model, a search or a factors file holds."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in _facts(what, runtime).items():
        table.add_row(name, str(value))
    Console().print(table)


def _facts(what: str | None, runtime: bool) -> dict[str, Any]:
    import longrope

    if runtime and (what is None or not (Path(what) / "config.json").is_file()):
        raise ValueError(f"--runtime: expected WHAT to be the folder of a model, got {what!r}")
    if what is None:
        import transformers

        facts = {"longrope": longrope.__version__, **longrope._C.build_info()}
        return {**facts, "transformers": transformers.__version__}
    if Path(what).is_file():
        return _facts_of_factors(what)
    from longrope.errors import JournalError
    from longrope.extension import folder as extension
    from longrope.factor_search.folder import FACTORS, KIND, TIERS, summary
    from longrope.runs.folder import JOURNAL
    from longrope.runs.journal import is_begun

    if extension.is_one(Path(what)):
        return extension.summary(Path(what))
    if (Path(what) / JOURNAL).is_file():
        found = Path(what) / FACTORS
        try:
            is_begun(Path(what) / JOURNAL, KIND)
        except JournalError:
            raise ValueError(
                "WHAT: expected the folder of a model, or of a run of search or extend, got that "
                f"of another run, {what!r}"
            ) from None
        said = summary(Path(what))
        if not found.is_file():
            return said
        if (Path(what) / TIERS).is_file():  # of a ladder, whose last tier alone is in the other
            found = Path(what) / TIERS
        length = said["target length"]
        following = f"longrope perplexity MODEL DATA --length {length} --factors {found}"
        return said | _facts_of_factors(found) | {"next": following}
    from longrope.cli.doctor import diagnosis

    if not (Path(what) / "config.json").is_file():
        raise ValueError(
            f"WHAT: expected the folder of a model or a search, or factors, got {what!r}"
        )
    return _paths(what) if runtime else diagnosis(Path(what))


def _paths(what: str) -> dict[str, Any]:
    """Return the attention, cache and device that a model takes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from longrope.patching.runtime import runtime_facts

    check_config("WHAT", Path(what))
    config = AutoConfig.from_pretrained(what, trust_remote_code=False)
    with torch.device("meta"):
        return runtime_facts(AutoModelForCausalLM.from_config(config))


def _facts_of_factors(path: str | Path) -> dict[str, Any]:
    import longrope
    from longrope.factors.files import states_settings

    if not states_settings(Path(path)):
        factors = longrope.RescaleFactors.load(path, attention_factor=1.0)
        return {
            "lengths, rope theta, attention factor": "not stated (a CSV file holds factors alone)",
            "start tokens": factors.start_tokens,
            "rotary dim": factors.rotary_dim,
            "lambdas": " ".join(f"{v:g}" for v in factors.lambdas),
        }
    tiers = longrope.Tiers.load(path)
    if len(tiers) > 1:
        return {f"tier {number}": line for number, line in enumerate(repr(tiers).split("\n")[2:])}
    factors = tiers[0]
    one, of = factors.one_set(), ""
    own = {}
    if factors.per_head:
        layers, heads = factors.heads
        own["of their own"] = f"{layers} layers" + f", {heads} heads each" * (heads > 1)
        of = ", their mean" if factors.shared is None else ", of the set that they began with"
    return {
        "original length": factors.original_length,
        "target length": factors.target_length,
        "start tokens": factors.start_tokens,
        **own,
        f"attention factor{of}": f"{one.attention_factor:.6g}",
        "rope theta": factors.rope_theta,
        "rotary dim": factors.rotary_dim,
        f"lambdas{of}": " ".join(f"{v:g}" for v in one.lambdas),
    }
