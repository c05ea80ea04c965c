"""`longrope.search`: from a model and documents to rescale factors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope._numbers import perplexity_of
from longrope.distributed import ranks
from longrope.evaluation.identity import digest, fingerprint
from longrope.evaluation.memory import (
    WHOLE_WINDOWS,
    BackwardPlan,
    plan_backward,
    plan_batches,
)
from longrope.factor_search import as_loaded, checks, folder
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.gradient import GradientEvaluator
from longrope.factor_search.header import explain, header
from longrope.factor_search.heads import HeadSearch, check_goes_on, heads_of
from longrope.factor_search.heads import most_evaluations as most_by_head
from longrope.factor_search.history import Evaluation, Role, SearchResult
from longrope.factor_search.ladder import LadderSearch
from longrope.factor_search.measurer import Measurer
from longrope.factor_search.methods import METHODS, SCREEN_WINDOWS, Task, most_evaluations
from longrope.factor_search.options import SearchArguments, SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factor_search.progress import progress_bar
from longrope.factor_search.sharded import ShardedEvaluator
from longrope.factor_search.windows import WindowsByRole
from longrope.patching.notices import warn_of_untested, warn_of_window
from longrope.patching.wrappers import (
    device_of,
    dtype_note,
    language_model,
)
from longrope.runs.folder import JOURNAL, write_config
from longrope.runs.journal import Journal, Replay
from longrope.runs.options import from_keywords


@ranks.on_all_ranks
@torch.inference_mode(False)  # windows that are made in it could not be differentiated
@from_keywords(SearchArguments)
def search(model: nn.Module, documents: Iterable[Any], options: SearchArguments) -> SearchResult:
    """Search the rescale factors that give the lowest perplexity at `target_length`.

    The search is over non-decreasing lambdas on a grid of 0.01 and the number of start tokens, by
    one of three methods. `"evolution"` is Algorithm 1 of LongRoPE (arXiv 2402.13753), which begins
    with PI, NTK and YaRN, here beside the other closed forms (`RescaleFactors.mrrope`, `.cope`,
    `.llama3`, `.dynamic_ntk`). `"gradient"` compares these and a family of ramps on a few windows,
    descends from the best of them by the gradient of the loss on random windows of the documents,
    and then tries other numbers of start tokens. `"hybrid"` takes the start of the descent, and the
    number of start tokens, from a short evolution. The model's weights are not changed, and neither
    is its rotary embedding: pass the result to `longrope.apply`.

    All candidates are measured on the same `samples` windows of `target_length` tokens, drawn with
    `seed`: one from each document, and further ones that do not overlap if there are fewer
    documents. The final factors are the best on held-out windows, which neither the evolution nor a
    step of a descent sees: one window of each document in `validation`, or, without it, up to
    `samples` further windows of `documents`. They choose among the best 8 of the evolution and the
    closed forms; or among points on the way of the descent, its start, YaRN, and the closed form
    that was the best on the search windows. So the result is never worse there than
    these. The model as loaded is measured beside them, and a warning says so where it is better.
    With too little text for both, the search windows choose.

    With `ladder=True` the result is tiers by position (`longrope.Tiers`): one for each doubling of
    the window of the model as loaded, searched one after another from the shortest on. Each has the
    lowest loss on its own range of positions, behind the tiers below, which are fixed by then; the
    tokens below the range go through the model once per window. The budget of candidates is that
    of each tier; the last takes one and a half times `steps`, in two descents at one and two times
    the learning rate, the others three quarters. Where YaRN by position is better over all ranges
    of the deciding windows, it is returned.

    A model that has factors or tiers applied, or a scaling in its config, is stage one: candidates
    multiply its lambdas (of tiers the last ones) and lead from its window to the target, the rules
    for that ratio are the seeds, the closed forms counted from the base compete beside them, and
    the result is the product (`SearchResult.stages`). A ladder goes on above tiers that are
    applied, and these stay as they are.

    In a `torch.distributed` job (after `init_process_group`) all ranks call this with the same
    arguments and share the measurements. Every rank returns the result of one process, to the bit;
    rank 0 writes the files; an error of one rank ends all of them. Ranks wait 1800 seconds for one
    another, or as long as the environment variable `LONGROPE_RANK_TIMEOUT` says.

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
    ladder
        Search tiers by position. Not with `shard_sequence`.
    per
        `"layer"` or `"head"`: every layer, or every key/value head with its query heads, gets
        factors of its own, by a second descent from the shared ones on, of as many steps. The
        held-out windows choose among points on its way, the shared factors, and mixtures of the two
        (`longrope.factor_search.heads`). A folder `out` of the same search for all heads, finished
        or not, goes on. Not with `"evolution"` or `critical_dimension`.
    scaling
        `"compose"`: on top of what the model has; `"ignore"`: from the base alone, in a window of
        `original_length`.
    objective
        `"perplexity"` of the windows; or `"needle"` (LongRoPE2, arXiv 2502.20082): that of 16
        random tokens at the end of each window, which also stand in its first tenth, after the same
        8 tokens.
    last_tokens
        Score only this many tokens at the end of each window, those with the most context; None:
        all but the first. In a ladder at most those of a tier's range. With `"perplexity"` only.
    bos
        The token in front of every window, `"auto"`, True or False, as in `longrope.perplexity`: a
        window is that token and `target_length - 1` tokens of text, of which the first is not
        scored. Resuming needs the same.
    preset
        The source of the defaults below: `"paper"`; `"paper-long"`, the paper's halved sizes
        and 3 documents for targets above 512k; or `"official-code"`, the released code's bound
        `1 + s` and list of start tokens.
    start_tokens
        `"search"`, or a fixed number of first tokens that keep the original angles.
    attention_factor
        `"yarn"` (`0.1 ln s + 1`), `"su"` (`sqrt(1 + ln s / ln L0)`), or a number, the same for all
        candidates; or `"search"`: learned in the descent, from YaRN's. None: `"yarn"` with
        `method="evolution"`, else `"search"`.
    original_length
        The window the model was trained for; None: from its config. On top of a stage that from
        which the stage counts, and no other.
    validation
        Held-out documents for the final choice.
    max_lambda
        Upper bound of lambda, also of pairs that a closed form stops; None: `1.25 s` with `s` the
        target over the window that the search starts from. `inf`, with `method="gradient"`: none
        (1e12, where no pair turns), so that a pair that CoPE stops can stay so. On top of a stage
        the bound of what multiplies it; in a ladder that of every tier, or with None each its own.
    seed
        The seed of the windows and of the search. Equal arguments give equal results to the bit on
        one machine, in equal batches: these follow from the free memory, and a resumed search takes
        those of its journal.
    samples
        The number of search windows (paper: 5); fewer where the documents hold fewer.
    population, mutations, crossovers, mutation_probability, iterations, parents
        Sizes of Algorithm 1 (paper: 64, 16, 16, 0.3, 40, 32; hybrid: 16, 8, 8, 0.3, 5, 8).
        `iterations` counts the populations that are measured, the first included.
    max_evaluations
        End the evolution after this many candidates, baselines included.
    race
        Drop candidates of the evolution early: after 1, 2, 4, ... search windows, those that are
        worse than the `parents`-th best by a one-sided paired Student t test at 0.01 on the losses
        of 16 blocks of tokens per window (not the share of wrong decisions: neighbouring blocks are
        not independent). Never the closed forms. The losses of the others are those without a race,
        up to rounding. Not with `"gradient"`.
    critical_dimension
        Search as LongRoPE2 (arXiv 2502.20082) does: the critical pair of dimensions, from the first
        that turns at most 10 times in the original window to the first that turns at most once, and
        the lambdas from it on, in `[s, 2 s]` (`max_lambda`: another upper bound). Faster pairs
        follow, `lambda_i = lambda_critical^(i / critical)`. The closed forms take part as they are.
    steps, learning_rate, windows_per_step
        The descent: 80 steps of Adam on log lambda, at a rate that falls from 0.05 to 0, on 1
        random window each.
    activation_checkpointing
        Compute activations again in the backward pass, chunk by chunk; None: if those of one window
        would take more than half of the free memory.
    batch_size
        Rows (candidates times windows) of one forward pass; None: from the memory that is free.
    shard_sequence
        For windows too long for one device, with `"evolution"`: every rank of the job holds a part
        of each window's tokens, and attention goes around the ranks in a ring.
    out
        Run directory: `config.json`, `journal.jsonl` (one durable line per evaluation),
        `factors.json`, `history.csv`, `report.html`, `results.csv`, plots; of a ladder also
        `tiers.json`.
    resume
        Continue from the journal in `out`: after a kill at any moment, the same call ends with the
        factors and the history of an uninterrupted run, to the bit. With `"evolution"`,
        `iterations` and `max_evaluations` may be larger than before, but for a ladder, and a `per`
        may follow on `"model"`; any other difference is refused and named. False: move an earlier
        search to a folder `previous-1` (and so on) of `out`, and start again.
    progress
        True: show a progress bar, in logs and notebooks without widgets a line every half minute;
        or a function that is called with the new evaluations after every batch, including those
        from the journal of an earlier run.

    Returns
    -------
    SearchResult

    Raises
    ------
    ValueError
        With one sentence for any argument out of range, a model without rotary embedding or, for a
        ladder, without a layer that sees beyond its first tier, a last tier without tokens to
        score, a document shorter than `target_length`, a window whose keys and values do not fit
        the free memory, an output that is not finite with a closed form, a folder that cannot be
        written, the journal of another search, or ranks that were not given the same search.
    LostRankError
        If a rank of the job has died or does not answer; a `RuntimeError`.
    """
    job = ranks.current()
    about = checks.asked(model, documents, options, job.size)
    problem, ladder, bos = about.problem, about.ladder, about.problem.bos
    randoms = [np.random.default_rng(s) for s in np.random.SeedSequence(options.seed).spawn(5)]
    drawn = WindowsByRole.draw(
        model, documents, options.validation, problem.target_length, options.windows, *randoms[:2],
        screened=SCREEN_WINDOWS if options.has_steps else 0,
        needles=randoms[4] if options.objective == "needle" and not ladder else None, bos=bos,
    )  # fmt: skip
    data: dict[str, str] = {role: digest(windows) for role, windows in drawn.windows.items()}
    if options.has_steps:
        data["documents"] = drawn.digest()
    above = None if ladder is None else ladder.as_fields()
    head = header(options, problem, fingerprint(model), data, job.size, above)
    job.check_same({**head, **options.limits, "per": options.per})
    if job.first:
        warn_of_untested(model)
        warn_of_window(model, problem.target_length)
    notes = _notes(model, options, job)
    if ladder is not None:
        keeps = job.gather(ladder.keeps(model, drawn))
        notes["kept_prefixes"] = [all(tier) for tier in zip(*keeps, strict=True)]
    with contextlib.ExitStack() as stack:
        journal: Replay | None = None
        if options.out is None:
            job.when_lost = "nothing was kept, because out was None"
        if options.out is not None and job.first:
            out = folder.prepare(options.out, options.resume)
            journal = stack.enter_context(
                Journal(out / JOURNAL, head, notes, kind=folder.KIND, explain=explain)
            )
            check_goes_on(journal, model, options.per)
            notes = journal.notes
            config = getattr(language_model(model), "config", None)
            name = getattr(config, "_name_or_path", "")
            asked = {"options": options.as_dict(), "model_name": name, "notes": notes}
            write_config(out, {**head, **options.limits, **asked})
        notes, journal = _everywhere(job, notes, journal)
        held_out = Role.VALIDATION in drawn.windows
        total = (
            most_evaluations(problem, options, held_out) + most_by_head(options, held_out)
            if ladder is None else ladder.most_evaluations(options, held_out)
        )  # fmt: skip
        on_batch = stack.enter_context(
            progress_bar(options.progress if job.first else False, total)
        )
        if ladder is None:
            result = _search(model, options, problem, drawn, notes, journal, on_batch, job, randoms)
        else:
            result = LadderSearch(
                model, options, ladder, drawn, notes, journal, on_batch, job
            ).run()
        if options.out is not None and job.first:
            folder.write_results(out, result)
    return result


def _search(
    model: nn.Module,
    options: SearchOptions,
    problem: Problem,
    drawn: WindowsByRole,
    notes: dict[str, Any],
    journal: Replay | None,
    on_batch: Callable[[Sequence[Evaluation], int], None],
    job: ranks.Ranks,
    randoms: Sequence[np.random.Generator],
) -> SearchResult:
    """Search one set of factors; the arguments are what `search` has made of its own."""
    differentiate = random_windows = None
    arguments = (model, problem.factors, notes["rows"], problem.last_tokens)
    if options.has_steps:
        differentiate = GradientEvaluator(
            model, problem.unit_inv_freq(), BackwardPlan(*notes["gradient"]),
            problem.last_tokens, job,
        )  # fmt: skip
        random_windows = drawn.random(randoms[3])
    if options.shard_sequence:
        evaluator = ShardedEvaluator(*arguments, job)
    else:
        evaluator = PopulationEvaluator(*arguments, notes["chunk"])
    measurer = Measurer(
        evaluator,
        drawn.windows,
        journal,
        max_evaluations=options.max_evaluations,
        on_batch=on_batch,
        differentiate=differentiate,
        ranks=None if options.shard_sequence else job,
        absolute=problem.absolute,
    )
    task = Task(problem, options, measurer, randoms[2], random_windows)
    chosen = METHODS[options.method](task)
    factors = problem.factors(chosen)
    validated = measurer.losses(Role.VALIDATION).get(chosen)
    result = SearchResult(
        factors=factors,
        perplexity=perplexity_of(task.measure(Role.SEARCH, [chosen], "finalist")[chosen]),
        validation_perplexity=None if validated is None else perplexity_of(validated),
        history=tuple(measurer.history),
        stages=problem.stage_parts(factors),
    )
    result = as_loaded.beside(result, model, evaluator, drawn.windows, job)
    if options.per == "model":
        measurer.finish()
        return result
    return HeadSearch(heads_of(model, options.per), lambda number, below: task).run(result)


def _notes(model: nn.Module, options: SearchOptions, job: ranks.Ranks) -> dict[str, Any]:
    """Return how the job would run the search; a resumed one continues as its journal says."""
    length, sharded = options.target_length, options.shard_sequence
    held = -(-length // job.size) if sharded else length
    batches = plan_batches(model, held, rows=options.batch_size, cut=not sharded)
    backward = WHOLE_WINDOWS
    if options.has_steps:
        backward = plan_backward(model, length, options.activation_checkpointing)
    everywhere = job.gather((batches, backward))
    # The rank with the least free memory decides.
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
        **dtype_note(model),
    }
    return notes | ({"gradient": backward} if options.has_steps else {})


def _everywhere(
    job: ranks.Ranks, notes: dict[str, Any], journal: Replay | None
) -> tuple[dict[str, Any], Replay | None]:
    """Return the first rank's notes and its journal; on the others a copy to replay from."""
    kept = None if journal is None else (journal.path, journal.pending)
    notes, kept = job.broadcast((notes, kept))
    if kept is not None:
        path, entries = kept
        job.when_lost = (
            f"the journal {str(path)!r} is complete up to its last line: start the same command "
            "again to resume"
        )
        journal = journal or Replay(path, notes, entries)
    return notes, journal
