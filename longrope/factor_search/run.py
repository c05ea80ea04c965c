"""`longrope.search`: from a model and documents to rescale factors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope import _validation
from longrope.documents import as_documents
from longrope.evaluation import rows_per_batch, vocabulary
from longrope.factor_search import run_directory
from longrope.factor_search.evaluator import PopulationEvaluator, fingerprint
from longrope.factor_search.evolution import Proposal, evolve
from longrope.factor_search.journal import Journal
from longrope.factor_search.ledger import Evaluation, Ledger, OutOfBudgetError
from longrope.factor_search.objective import digest, draw_windows
from longrope.factor_search.problem import PRESETS, Problem
from longrope.factor_search.progress import progress_bar
from longrope.factor_search.space import Candidate
from longrope.factors import RescaleFactors
from longrope.patching import rope_settings

METHODS = ("evolution",)
OBJECTIVES = ("perplexity",)

#: How many of the best candidates the validation windows choose from, the baselines aside.
FINALISTS = 8


@dataclass(frozen=True)
class SearchResult:
    """What `longrope.search` found.

    Attributes
    ----------
    factors
        The selected `RescaleFactors`.
    perplexity
        Of `factors` on the search windows.
    validation_perplexity
        Of `factors` on the validation windows; None where there were none.
    history
        Every evaluation, in order, as `Evaluation` (role, iteration, origin, lambdas,
        start_tokens, nll, perplexity).
    """

    factors: RescaleFactors
    perplexity: float
    validation_perplexity: float | None
    history: tuple[Evaluation, ...]


def search(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    target_length: int,
    method: str = "evolution",
    objective: str = "perplexity",
    preset: str = "paper",
    start_tokens: str | int = "search",
    attention_factor: str | float = "yarn",
    original_length: int | None = None,
    validation: Iterable[Any] | None = None,
    max_lambda: float | None = None,
    seed: int = 0,
    samples: int | None = None,
    population: int | None = None,
    mutations: int | None = None,
    crossovers: int | None = None,
    mutation_probability: float | None = None,
    iterations: int | None = None,
    parents: int | None = None,
    max_evaluations: int | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> SearchResult:
    """Search the rescale factors that give the lowest perplexity at `target_length`.

    Algorithm 1 of LongRoPE (arXiv 2402.13753): an evolutionary search over non-decreasing lambdas
    on a grid of 0.01 and over the number of start tokens, that begins with PI, NTK and YaRN. The
    model's weights are not changed, and neither is its rotary embedding: pass the result to
    `longrope.apply`.

    Every candidate is measured on the same windows of `target_length` tokens, `samples` of them,
    drawn with `seed`: one of each document as far as the documents last, else further windows that
    do not overlap. The final factors are the best by held-out windows among the best 8 on the
    search windows, PI, NTK and YaRN: one window of each document in `validation`, or, without it,
    up to `samples` further windows of `documents` (where these have enough text; otherwise the
    best on the search windows wins).

    Parameters
    ----------
    model
        A causal language model that `longrope.apply` supports.
    documents
        1-D token ids, each at least `target_length` long. See `longrope.load_data`.
    target_length
        The window to reach, in tokens; more than the original.
    method
        `"evolution"`.
    objective
        `"perplexity"`.
    preset
        Where the defaults below come from: `"paper"`; `"paper-long"`, the paper's halved sizes
        and 3 documents for targets above 512k; or `"official-code"`, the released code's bound
        `1 + s` and list of start tokens.
    start_tokens
        `"search"`, or a fixed number of first tokens that keep the original angles.
    attention_factor
        `"yarn"` (`0.1 ln s + 1`), `"su"` (`sqrt(1 + ln s / ln L0)`), or a number; the same for all
        candidates.
    original_length
        The window the model was trained for; None: from its config.
    validation
        Held-out documents for the final choice.
    max_lambda
        Upper bound of lambda; None: `1.25 s` with `s = target_length / original_length`.
    seed
        Of the windows and of the search. Equal arguments give equal results to the bit on one
        machine.
    samples
        Search windows (paper: 5).
    population, mutations, crossovers, mutation_probability, iterations, parents
        Sizes of Algorithm 1 (paper: 64, 16, 16, 0.3, 40, 32). `iterations` counts the populations
        that are measured, the first included.
    max_evaluations
        Stop after this many candidates, baselines included.
    batch_size
        Rows (candidates times windows) of one forward pass; None: from the memory that is free.
    out
        Run directory: `config.json`, `journal.jsonl` (one durable line per evaluation),
        `factors.json`, `history.csv`, `search.png`.
    resume
        Continue from the journal in `out`: after a kill at any moment, the same call ends with the
        factors and the history of an uninterrupted run, to the bit. `iterations` and
        `max_evaluations` may be larger than before; any other difference is refused and named.
        False: set an existing journal aside and start again.
    progress
        Show a progress bar.

    Returns
    -------
    SearchResult

    Raises
    ------
    ValueError
        With one sentence for any argument out of range, a model without rotary embedding, a
        document shorter than `target_length`, an output that is not finite with PI, NTK or YaRN,
        a folder that cannot be written, or the journal of another search.
    """
    _one_of("method", method, METHODS)
    _one_of("objective", objective, OBJECTIVES)
    _one_of("preset", preset, tuple(PRESETS))
    given = {
        "population": population,
        "mutations": mutations,
        "crossovers": crossovers,
        "mutation_probability": mutation_probability,
        "iterations": iterations,
        "parents": parents,
    }
    sizes = dataclasses.replace(
        PRESETS[preset].sizes, **{name: v for name, v in given.items() if v is not None}
    )
    samples = PRESETS[preset].samples if samples is None else samples
    samples = _validation.integer("samples", samples, 1)
    seed = _validation.integer("seed", seed, 0)
    for name, value in (("batch_size", batch_size), ("max_evaluations", max_evaluations)):
        if value is not None:
            _validation.integer(name, value, 1)
    problem = Problem.of(
        rope_settings(model),
        target_length=target_length,
        original_length=original_length,
        attention_factor=attention_factor,
        start_tokens=start_tokens,
        max_lambda=max_lambda,
        preset=PRESETS[preset],
    )
    random_windows, random_validation, random_search = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)
    )
    windows = _windows(
        model, documents, validation, problem.target_length, samples, random_windows,
        random_validation,
    )  # fmt: skip
    header = {
        # The first difference is what a refusal names: what decides the windows before the windows.
        "method": method,
        "objective": objective,
        "problem": dataclasses.asdict(problem),
        "sizes": {k: v for k, v in dataclasses.asdict(sizes).items() if k != "iterations"},
        "batch_size": batch_size,
        "seed": seed,
        "model": fingerprint(model),
        "data": {role: digest(w) for role, w in windows.items()},
    }
    notes = {
        "rows": batch_size or rows_per_batch(model, problem.target_length),
        "torch": torch.__version__,
        "device": str(next(model.parameters()).device),
    }
    most = min(sizes.most_evaluations, max_evaluations or sizes.most_evaluations)
    most += FINALISTS + len(problem.seeds()) if "validation" in windows else 0
    with contextlib.ExitStack() as stack:
        journal = None
        if out is not None:
            out = run_directory.prepare(out)
            journal = stack.enter_context(
                Journal(out / run_directory.JOURNAL, header, notes, resume)
            )
            notes = journal.notes
            name = getattr(getattr(model, "config", None), "_name_or_path", "")
            run_directory.write_config(
                out,
                {**header, "model_name": name, "preset": preset, "iterations": sizes.iterations,
                 "max_evaluations": max_evaluations, "notes": notes},
            )  # fmt: skip
        ledger = Ledger(
            PopulationEvaluator(model, problem.factors, notes["rows"]),
            windows,
            journal,
            max_evaluations=max_evaluations,
            on_batch=stack.enter_context(progress_bar(progress, most)),
        )
        with contextlib.suppress(OutOfBudgetError):
            evolve(problem.space, problem.seeds(), ledger.measure, sizes, random_search)
        chosen, validation_nll = _choose(ledger, problem.seeds())
        factors = problem.factors(chosen)
        result = SearchResult(
            factors=factors,
            perplexity=float(np.exp(ledger.losses("search")[chosen])),
            validation_perplexity=None if validation_nll is None else float(np.exp(validation_nll)),
            history=tuple(ledger.history),
        )
        if out is not None:
            run_directory.write_results(out, factors, result.history, problem.baselines())
    return result


def _windows(
    model, documents, validation, length, samples, random_windows, random_validation
) -> dict[str, torch.Tensor]:
    """Draw the windows of each role, int64 `[S, length]` on the CPU."""
    vocab_size = vocabulary(model)
    documents = as_documents(documents, min_length=length, vocab_size=vocab_size)
    if validation is not None:
        validation = as_documents(
            validation, min_length=length, vocab_size=vocab_size, name="validation"
        )
        held_out = draw_windows(validation, length, len(validation), random_validation)
        searched = draw_windows(documents, length, samples, random_windows)
    else:
        both = draw_windows(documents, length, 2 * samples, random_windows)
        searched, held_out = both[:samples], both[samples:]
    return {"search": searched} | ({"validation": held_out} if len(held_out) else {})


def _choose(ledger: Ledger, seeds: dict[str, Candidate]) -> tuple[Candidate, float | None]:
    """Return the best of the finalists on the validation windows, else on the search windows."""
    searched = ledger.losses("search")
    ranked = sorted(searched, key=searched.__getitem__)
    if "validation" not in ledger.windows:
        return ranked[0], None
    names = {candidate: name for name, candidate in seeds.items() if candidate in searched}
    finalists = [c for c in ranked if c not in names][:FINALISTS]
    proposals = [Proposal(c, "finalist", -1) for c in finalists]
    proposals += [Proposal(c, name, -1) for c, name in names.items()]
    losses = dict(
        zip((p.candidate for p in proposals), ledger.measure(proposals, "validation"), strict=True)
    )
    best = min(losses, key=losses.__getitem__)
    return best, losses[best]


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")
