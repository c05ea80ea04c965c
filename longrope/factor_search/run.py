"""`longrope.search`: from a model and documents to rescale factors."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope import _validation
from longrope.factor_search import needles, racing, ranks, run_directory
from longrope.factor_search.differentiation import LossGradient, needs_checkpointing
from longrope.factor_search.evaluator import PopulationEvaluator, fingerprint
from longrope.factor_search.gradient import DescentSettings
from longrope.factor_search.history import Evaluation, SearchResult
from longrope.factor_search.journal import Journal, Replay
from longrope.factor_search.ledger import Ledger
from longrope.factor_search.methods import HYBRID_SIZES, METHODS, SCREEN_WINDOWS, Task
from longrope.factor_search.objective import WindowsByRole, digest
from longrope.factor_search.problem import PRESETS, Problem
from longrope.factor_search.progress import progress_bar
from longrope.factor_search.sharded import ShardedEvaluator
from longrope.layout import plan_batches
from longrope.patching import rope_settings

OBJECTIVES = ("perplexity", "needle")


@ranks.on_all_ranks
def search(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    target_length: int,
    method: str = "gradient",
    objective: str = "perplexity",
    last_tokens: int | None = None,
    preset: str = "paper",
    start_tokens: str | int = "search",
    attention_factor: str | float | None = None,
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
    race: bool = False,
    critical_dimension: bool = False,
    steps: int | None = None,
    learning_rate: float | None = None,
    windows_per_step: int | None = None,
    activation_checkpointing: bool | None = None,
    batch_size: int | None = None,
    shard_sequence: bool = False,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | Callable[[Sequence[Evaluation]], None] = True,
) -> SearchResult:
    """Search the rescale factors that give the lowest perplexity at `target_length`.

    Over non-decreasing lambdas on a grid of 0.01 and the number of start tokens, by one of three
    methods. `"evolution"` is Algorithm 1 of LongRoPE (arXiv 2402.13753), which begins with PI, NTK
    and YaRN. `"gradient"` compares these and a family of ramps on a few windows, then descends from
    the best of them by the gradient of the loss on random windows of the documents, then tries
    other numbers of start tokens. `"hybrid"` takes the start of the descent, and the number of
    start tokens, from a short evolution. The model's weights are not changed, and neither is its
    rotary embedding: pass the result to `longrope.apply`.

    Candidates are measured on the same windows of `target_length` tokens, `samples` of them,
    drawn with `seed`: one of each document as far as the documents last, else further windows that
    do not overlap. The final factors are the best on held-out windows, which neither the evolution
    nor a step of a descent sees: one window of each document in `validation`, or, without it, up to
    `samples` further windows of `documents`. They choose among the best 8 of the evolution, PI, NTK
    and YaRN; or among points on the way of the descent, its start and YaRN. So the result is never
    worse there than YaRN. Where there is too little text, the search windows choose.

    In a `torch.distributed` job (`init_process_group` done; the command `longrope search` does it
    under torchrun) all ranks call this with the same arguments and share the measurements, with the
    result of one process to the bit; every rank returns it. Rank 0 writes the files. An error of
    one rank ends all of them. Ranks wait for one another for 1800 seconds, or as many as the
    environment variable `LONGROPE_RANK_TIMEOUT` says.

    Parameters
    ----------
    model
        A causal language model that `longrope.apply` supports.
    documents
        1-D token ids, each at least `target_length` long. See `longrope.load_data`.
    target_length
        The window to reach, in tokens; more than the original.
    method
        `"gradient"`, `"evolution"` (the paper's, at about ten times the cost) or `"hybrid"`.
    objective
        `"perplexity"` of the windows; or `"needle"` (LongRoPE2, arXiv 2502.20082): of 16 random
        tokens at the end of each window, which also stand in its first tenth, after the same 8.
    last_tokens
        Score only so many tokens at the end of each window, those with the most context; None: all
        but the first. With `"perplexity"` only.
    preset
        Where the defaults below come from: `"paper"`; `"paper-long"`, the paper's halved sizes
        and 3 documents for targets above 512k; or `"official-code"`, the released code's bound
        `1 + s` and list of start tokens.
    start_tokens
        `"search"`, or a fixed number of first tokens that keep the original angles.
    attention_factor
        `"yarn"` (`0.1 ln s + 1`), `"su"` (`sqrt(1 + ln s / ln L0)`), or a number, the same for all
        candidates; or `"search"`: learned in the descent, from YaRN's. None: `"yarn"` with
        `method="evolution"`, else `"search"`.
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
        Sizes of Algorithm 1 (paper: 64, 16, 16, 0.3, 40, 32; hybrid: 16, 8, 8, 0.3, 5, 8).
        `iterations` counts the populations that are measured, the first included.
    max_evaluations
        End the evolution after this many candidates, baselines included.
    race
        Drop candidates of the evolution that are clearly worse on the first search windows; False,
        as in the paper: measure every candidate on all of them. After 1, 2, 4, ... windows those of
        a generation's new candidates go that are worse than the `parents`-th best, of the parents
        and of the candidates still in the race, by a one-sided paired Student t test at 0.01 on the
        losses of 16 blocks of tokens per window: they would hardly be parents (after F-Race,
        Birattari et al. 2002, and Maron and Moore's Hoeffding races, 1994). The test takes blocks
        for independent, which neighbours in one document are not, so 0.01 is not the share of wrong
        decisions. PI, NTK and YaRN are never dropped, and the losses of those that remain are what
        they would be without the race, up to rounding. Not with `"gradient"`.
    critical_dimension
        Search as LongRoPE2 (arXiv 2502.20082) does: only lambdas from a critical pair of dimensions
        on, in `[s, 2 s]` (`max_lambda`: another upper bound), and the critical pair, from the first
        that turns at most 10 times in the original window to the first that turns at most once.
        Faster pairs follow, `lambda_i = lambda_critical^(i / critical)`. PI, NTK and YaRN are
        compared with nonetheless, as they are.
    steps, learning_rate, windows_per_step
        Of the descent: 80 steps of Adam on log lambda, at a rate that falls from 0.05 to 0, on 1
        random window each.
    activation_checkpointing
        Compute activations again in the backward pass instead of keeping them; None: where those
        of one window would take more than half of the free memory.
    batch_size
        Rows (candidates times windows) of one forward pass; None: from the memory that is free.
        Long windows go through the model in chunks, with a cache of keys and values.
    shard_sequence
        For windows too long for one device, with `"evolution"`: every rank of the job holds its
        share of each window's tokens, and attention goes around the ranks in a ring. The values
        agree with those of whole windows up to rounding.
    out
        Run directory: `config.json`, `journal.jsonl` (one durable line per evaluation; in a race
        with the losses of the blocks, so that its decisions are the same when it resumes),
        `factors.json`, `history.csv`, `search.png`.
    resume
        Continue from the journal in `out`: after a kill at any moment, the same call ends with the
        factors and the history of an uninterrupted run, to the bit. With `"evolution"`,
        `iterations` and `max_evaluations` may be larger than before; any other difference is
        refused and named. False: set an existing journal aside and start again.
    progress
        Show a progress bar; or a function that is called with the new evaluations after every
        batch, also with those that an earlier run's journal gave.

    Returns
    -------
    SearchResult

    Raises
    ------
    ValueError
        With one sentence for any argument out of range, a model without rotary embedding, a
        document shorter than `target_length`, a window whose keys and values do not fit the free
        memory, an output that is not finite with PI, NTK or YaRN, a folder that cannot be written,
        the journal of another search, or ranks that were not given the same search.
    LostRankError
        Where a rank of the job has died or does not answer; a `RuntimeError`.
    """
    job = ranks.current()
    _one_of("method", method, tuple(METHODS))
    _one_of("objective", objective, OBJECTIVES)
    _one_of("preset", preset, tuple(PRESETS))
    sizes = {
        "population": population,
        "mutations": mutations,
        "crossovers": crossovers,
        "mutation_probability": mutation_probability,
        "iterations": iterations,
        "parents": parents,
    }
    descent = {
        "steps": steps,
        "learning_rate": learning_rate,
        "windows_per_step": windows_per_step,
    }
    if attention_factor is None:
        attention_factor = "yarn" if method == "evolution" else "search"
    if method == "gradient":
        _not_with(f"method={method!r}", {**sizes, "max_evaluations": max_evaluations})
        if race:
            raise ValueError("race: expected False with method='gradient', got True")
    if method == "evolution":
        _not_with(
            f"method={method!r}", {**descent, "activation_checkpointing": activation_checkpointing}
        )
        if attention_factor == "search":
            raise ValueError(
                "attention_factor: expected 'yarn', 'su' or a number with method='evolution', got "
                "'search', which method='gradient' and 'hybrid' know"
            )
    sizes = _replace(HYBRID_SIZES if method == "hybrid" else PRESETS[preset].sizes, sizes)
    descent = _replace(DescentSettings(), descent)
    samples = PRESETS[preset].samples if samples is None else samples
    samples = _validation.integer("samples", samples, 1)
    seed = _validation.integer("seed", seed, 0)
    for name, value in (("batch_size", batch_size), ("max_evaluations", max_evaluations)):
        if value is not None:
            _validation.integer(name, value, 1)
    if last_tokens is not None:
        _validation.integer("last_tokens", last_tokens, 1)
    problem = Problem.of(
        rope_settings(model),
        target_length=target_length,
        original_length=original_length,
        attention_factor=attention_factor,
        start_tokens=start_tokens,
        max_lambda=max_lambda,
        preset=PRESETS[preset],
        critical_dimension=critical_dimension,
    )
    if shard_sequence:
        _check_sharding(job, method, problem)
    if objective == "needle":
        _not_with(f"objective={objective!r}", {"last_tokens": last_tokens})
        if problem.target_length < needles.SHORTEST:
            raise ValueError(
                f"target_length: expected at least {needles.SHORTEST} tokens with "
                f"objective='needle', got {problem.target_length}"
            )
        last_tokens = needles.ANSWER_TOKENS
    randoms = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(5)]
    drawn = WindowsByRole.draw(
        model, documents, validation, problem.target_length, samples, *randoms[:2],
        screened=0 if method == "evolution" else SCREEN_WINDOWS,
        needles=randoms[4] if objective == "needle" else None,
    )  # fmt: skip
    settings = {
        "evolution": {"sizes": {k: v for k, v in vars(sizes).items() if k != "iterations"}},
        "gradient": {"descent": vars(descent)},
        "hybrid": {
            "sizes": {**vars(sizes), "max_evaluations": max_evaluations},
            "descent": vars(descent),
        },
    }
    header = {
        # The first difference is what a refusal names: what decides the windows before the windows.
        "method": method,
        "objective": objective,
        "last_tokens": last_tokens,
        # None where off, as in the journals of versions that had no such option.
        "race": racing.SETTINGS if race else None,
        "critical_dimension": critical_dimension or None,
        "problem": dataclasses.asdict(problem),
        **settings[method],
        "batch_size": batch_size,
        "seed": seed,
        "model": fingerprint(model),
        "data": {role: digest(w) for role, w in drawn.windows.items()},
    }
    if method != "evolution":
        header["data"]["documents"] = drawn.digest()
    if shard_sequence:
        header["shard_sequence"] = job.size
    limits = {"iterations": sizes.iterations, "max_evaluations": max_evaluations}
    job.check_same({**header, **limits})
    held = -(-problem.target_length // job.size) if shard_sequence else problem.target_length
    layout = plan_batches(model, held, rows=batch_size, cut=not shard_sequence)
    notes = {
        "rows": layout.rows,
        "chunk": layout.chunk,
        "activation_checkpointing": needs_checkpointing(model, problem.target_length)
        if activation_checkpointing is None
        else activation_checkpointing,
        "torch": torch.__version__,
        "device": str(next(model.parameters()).device),
    }
    with contextlib.ExitStack() as stack:
        journal = None
        if out is not None and job.first:
            out = run_directory.prepare(out)
            journal = stack.enter_context(
                Journal(out / run_directory.JOURNAL, header, notes, resume)
            )
            notes = journal.notes
            name = getattr(getattr(model, "config", None), "_name_or_path", "")
            run_directory.write_config(
                out, {**header, "model_name": name, "preset": preset, **limits, "notes": notes}
            )
        notes, journal = _everywhere(job, notes, journal)
        evaluator = (
            ShardedEvaluator(model, problem.factors, notes["rows"], last_tokens, job)
            if shard_sequence
            # A journal from before windows were cut has no "chunk".
            else PopulationEvaluator(
                model, problem.factors, notes["rows"], last_tokens, notes.get("chunk")
            )
        )
        ledger = Ledger(
            evaluator,
            drawn.windows,
            journal,
            max_evaluations=max_evaluations,
            ranks=None if shard_sequence else job,
        )
        task = Task(problem, ledger, sizes, descent, randoms[2], None, race)
        if method != "evolution":
            ledger.differentiate = LossGradient(
                model,
                problem.baselines()["pi"].base_inv_freq(),
                notes["activation_checkpointing"],
                last_tokens,
                job,
            )
            task.random_windows = drawn.random(randoms[3])
        ledger.on_batch = stack.enter_context(
            progress_bar(progress if job.first else False, task.most_evaluations[method])
        )
        chosen = METHODS[method](task)
        factors = problem.factors(chosen)
        validated = ledger.losses(task.judge)[chosen] if task.judge == "validation" else None
        result = SearchResult(
            factors=factors,
            perplexity=math.exp(task.measure("search", [chosen], "finalist")[chosen]),
            validation_perplexity=None if validated is None else math.exp(validated),
            history=tuple(ledger.history),
        )
        if out is not None and job.first:
            run_directory.write_results(out, factors, result.history, problem.baselines())
    return result


def _everywhere(
    job: ranks.Ranks, notes: dict[str, Any], journal: Journal | None
) -> tuple[dict[str, Any], Replay | None]:
    """Return the first rank's notes and its journal; on the others a copy to replay from."""
    kept = None if journal is None else (journal.path, journal.pending)
    notes, kept = job.broadcast((notes, kept))
    if kept is not None:
        job.journal_path = kept[0]
        journal = journal or Replay(kept[0], notes, kept[1])
    return notes, journal


def _check_sharding(job: ranks.Ranks, method: str, problem: Problem) -> None:
    if method != "evolution":
        raise ValueError(
            f"shard_sequence: expected False with method={method!r}, whose steps go backwards "
            "through the model; method='evolution' can"
        )
    if job.size == 1:
        raise ValueError(
            "shard_sequence: expected a torch.distributed job of 2 ranks or more, got 1"
        )
    if problem.target_length < 2 * job.size:
        raise ValueError(
            f"target_length: expected at least {2 * job.size} tokens to shard over {job.size} "
            f"ranks, got {problem.target_length}"
        )


def _replace(settings: Any, given: dict[str, Any]) -> Any:
    return dataclasses.replace(settings, **{k: v for k, v in given.items() if v is not None})


def _not_with(setting: str, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with {setting}, got {value!r}")


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")
