"""`longrope.search`: from a model and documents to rescale factors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope import _validation
from longrope.distributed import ranks
from longrope.evaluation.memory import (
    WHOLE_WINDOWS,
    GradientLayout,
    device_of,
    plan_batches,
    plan_gradient,
)
from longrope.factor_search import folder
from longrope.factor_search.evaluator import PopulationEvaluator, fingerprint
from longrope.factor_search.gradient import LossGradient
from longrope.factor_search.history import Evaluation, SearchResult
from longrope.factor_search.ledger import Ledger
from longrope.factor_search.methods import METHODS, SCREEN_WINDOWS, Task
from longrope.factor_search.progress import progress_bar
from longrope.factor_search.settings import Settings, explain
from longrope.factor_search.sharded import ShardedEvaluator
from longrope.factor_search.windows import WindowsByRole, digest
from longrope.patching import rope_settings
from longrope.runs.journal import Journal, Replay


@ranks.on_all_ranks
@torch.inference_mode(False)  # windows that are made in it could not be differentiated
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
        machine, in equal batches: these follow from the free memory, and a resumed search has
        those of its journal.
    samples
        Search windows (paper: 5), at most; fewer where the documents hold fewer.
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
        Compute activations again in the backward pass, chunk by chunk, and keep only keys, values
        and their gradients; None: where the activations of one window would take more than half of
        the free memory.
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
        refused and named. False: set an existing search aside, in a folder `previous-1` and so on
        of `out`, and start again.
    progress
        True: show a progress bar; or a function that is called with the new evaluations after every
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
    if not callable(progress) and progress not in (True, False):
        raise ValueError(f"progress: expected True, False or a function, got {progress!r}")
    resume = _validation.switch("resume", resume)
    settings = Settings.of(
        rope_settings(model),
        job.size,
        method=method,
        objective=objective,
        last_tokens=last_tokens,
        preset=preset,
        problem={
            "target_length": target_length,
            "original_length": original_length,
            "attention_factor": attention_factor,
            "start_tokens": start_tokens,
            "max_lambda": max_lambda,
            "critical_dimension": critical_dimension,
        },
        sizes={
            "population": population,
            "mutations": mutations,
            "crossovers": crossovers,
            "mutation_probability": mutation_probability,
            "iterations": iterations,
            "parents": parents,
        },
        descent={
            "steps": steps,
            "learning_rate": learning_rate,
            "windows_per_step": windows_per_step,
        },
        activation_checkpointing=activation_checkpointing,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        max_evaluations=max_evaluations,
        race=race,
        shard_sequence=shard_sequence,
    )
    if settings.has_steps and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "model: expected parameters that were made outside torch.inference_mode(), "
            "got inference tensors, which take no part in gradients"
        )
    problem = settings.problem
    randoms = [np.random.default_rng(s) for s in np.random.SeedSequence(settings.seed).spawn(5)]
    drawn = WindowsByRole.draw(
        model, documents, validation, problem.target_length, settings.samples, *randoms[:2],
        screened=SCREEN_WINDOWS if settings.has_steps else 0,
        needles=randoms[4] if objective == "needle" else None,
    )  # fmt: skip
    header = {
        **settings.header(),
        "model": fingerprint(model),
        "data": {role: digest(w) for role, w in drawn.windows.items()},
    }
    if settings.has_steps:
        header["data"]["documents"] = drawn.digest()
    if shard_sequence:
        header["shard_sequence"] = job.size
    job.check_same({**header, **settings.limits})
    notes = _notes(model, settings, job)
    with contextlib.ExitStack() as stack:
        journal = None
        if out is not None and job.first:
            out = folder.prepare(out, resume)
            journal = stack.enter_context(Journal(out / folder.JOURNAL, header, notes, explain))
            notes = journal.notes
            name = getattr(getattr(model, "config", None), "_name_or_path", "")
            about = {"model_name": name, "preset": preset, **settings.limits, "notes": notes}
            folder.write_config(out, {**header, **about})
        notes, journal = _everywhere(job, notes, journal)
        ledger = Ledger(
            _evaluator(model, settings, notes, job),
            drawn.windows,
            journal,
            max_evaluations=max_evaluations,
            ranks=None if shard_sequence else job,
        )
        task = Task(problem, ledger, settings.sizes, settings.descent, randoms[2], None, race)
        if settings.has_steps:
            base = problem.baselines()["pi"].base_inv_freq()
            # A journal from before backward passes were cut says one thing about them.
            layout = notes.get("gradient", [notes.get("activation_checkpointing", False)])
            ledger.differentiate = LossGradient(
                model, base, GradientLayout(*layout), settings.last_tokens, job
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
        ledger.finish()
        if out is not None and job.first:
            folder.write_results(out, factors, result.history, problem.baselines())
    return result


def _notes(model: nn.Module, settings: Settings, job: ranks.Ranks) -> dict[str, Any]:
    """Return how the job would run the search; a resumed one goes on as its journal says."""
    length, sharded = settings.problem.target_length, settings.shard_sequence
    held = -(-length // job.size) if sharded else length
    layout = plan_batches(model, held, rows=settings.batch_size, cut=not sharded)
    backward = WHOLE_WINDOWS
    if settings.has_steps:
        backward = plan_gradient(model, length, settings.activation_checkpointing)
    everywhere = job.gather((layout, backward))
    # Where least memory is free decides.
    rows, chunk = min((plan for plan, _ in everywhere), key=lambda p: (p.rows, p.chunk or math.inf))
    backward = min(
        (plan for _, plan in everywhere),
        key=lambda p: (p.chunk or math.inf, not p.checkpointed_layers),
    )
    notes = {
        "rows": rows,
        "chunk": chunk,
        "torch": torch.__version__,
        "device": str(device_of(model)),
    }
    return notes | ({"gradient": backward} if settings.has_steps else {})


def _evaluator(
    model: nn.Module, settings: Settings, notes: dict[str, Any], job: ranks.Ranks
) -> PopulationEvaluator | ShardedEvaluator:
    arguments = (model, settings.problem.factors, notes["rows"], settings.last_tokens)
    if settings.shard_sequence:
        return ShardedEvaluator(*arguments, job)
    # A journal from before windows were cut has no "chunk".
    return PopulationEvaluator(*arguments, notes.get("chunk"))


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
