"""The header of a search's journal: what a search must share to be resumed."""

from __future__ import annotations

import dataclasses
from typing import Any

from longrope.factor_search import racing
from longrope.factor_search.options import SearchOptions
from longrope.factor_search.problem import Problem

#: What users call the parts of a header that have other names there.
_WORDS = {
    "data.search:": "search windows, of documents and samples:",
    "data.screen:": "first search windows, of documents and samples:",
    "data.validation:": "validation windows, of documents or validation:",
    "data.documents:": "documents:",
    "problem.bos:": "bos:",
    "problem.last_tokens:": "last_tokens:",
    "problem.space.start_tokens:": "start_tokens:",
    "problem.space.upper:": "max_lambda, in hundredths:",
    "problem.learn_attention:": "attention_factor, learned:",
    "problem.stage.": "model, its own scaling: ",
    "problem.stage:": "model, its own scaling:",
}


def header(
    options: SearchOptions,
    problem: Problem,
    model: str,
    data: dict[str, str],
    ranks: int,
    ladder: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the header; the first difference from that of a journal is what a refusal names.

    `model` and the values of `data` are hashes; `ranks` is the number of processes; `ladder` says
    which tiers are searched above which. `per` is not in it: layers and heads go on from the
    search for all of them (`longrope.factor_search.heads.check_goes_on`).
    """
    asked: dict[str, Any] = {}
    if options.method == "evolution" and not options.ladder:  # `options.limits` may grow
        asked["sizes"] = {k: v for k, v in vars(options.sizes).items() if k != "iterations"}
    elif options.has_steps:
        asked["descent"] = vars(options.descent)
    if options.method == "hybrid" or (options.ladder and not options.has_steps):
        asked["sizes"] = {**vars(options.sizes), "max_evaluations": options.max_evaluations}
    return {
        "method": options.method,
        "objective": options.objective,
        "race": racing.SETTINGS if options.race else None,
        "critical_dimension": options.critical_dimension or None,
        "problem": _fields(problem),
        "ladder": ladder,
        **asked,
        "activation_checkpointing": options.activation_checkpointing,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "model": model,
        "data": data,
        "shard_sequence": ranks if options.shard_sequence else None,
    }


def _fields(problem: Problem) -> dict[str, Any]:
    """Return what a problem is, in JSON values, without what follows from the rest."""
    fields = dataclasses.asdict(dataclasses.replace(problem, stage=None, below=None))
    for found in ("stage", "below", "shapes", "yarn_attention"):
        del fields[found]
    # First, so that it is what a refusal names: the rest follows from it.
    return {"stage": None if problem.stage is None else problem.stage.as_fields(), **fields}


def explain(difference: str) -> str:
    """Return a difference between two headers in the words of `longrope.search`."""
    for name, words in _WORDS.items():
        if difference.startswith(name):
            return words + difference.removeprefix(name)
    return difference
