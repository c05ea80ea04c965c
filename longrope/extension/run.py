"""`longrope.extend`: from a model and documents to the same model with a longer window."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope._validation import count, natural, switch
from longrope._warnings import warn
from longrope.checkpoints import Measured, export
from longrope.checkpoints.card import on_top_of
from longrope.checkpoints.source import checked_tokenizer
from longrope.distributed import ranks
from longrope.documents import as_documents
from longrope.documents.checks import like
from longrope.evaluation.identity import digest
from longrope.evaluation.modes import vocabulary
from longrope.extension import folder
from longrope.extension.beside import finish
from longrope.extension.checks import check_stages
from longrope.extension.config import FinetuneConfig
from longrope.extension.plan import FinetuneStage, Plan, RecoverStage, Stage
from longrope.extension.schedules import make_plan
from longrope.extension.stages import State, Work, for_every_position, run_stage, take_stage
from longrope.extension.table import excerpts, row_as_json, row_from_json, table_of
from longrope.factors import Tiers
from longrope.patching import apply, rope_settings
from longrope.patching.embedding import RescaledRotaryEmbedding
from longrope.patching.families import decoder
from longrope.patching.tiered import TieredRotaryEmbedding
from longrope.patching.wrappers import dtype_note
from longrope.runs.folder import write_text
from longrope.runs.options import Options, about, from_keywords

#: Documents that are held out of everything but the table: one in so many.
HELD_OUT = 10
ORIGINAL = "the model as it was"


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, (str, Path)):
        raise ValueError(f"{name}: expected a path, got {type(value).__name__}")
    return Path(value)


@dataclass(frozen=True, kw_only=True)
class ExtendArguments(Options):
    """The keyword arguments of `extend`."""

    target_length: int = field(metadata=about(count))
    out: str | Path = field(metadata=about(_path))
    finetune: FinetuneConfig | None = None
    stages: str | Path | Sequence[Mapping[str, Any]] | None = None
    held_out: Iterable[Any] | None = None
    test_windows: int = field(default=8, metadata=about(count))
    tokenizer: Any = field(default=None, metadata=about(checked_tokenizer))
    seed: int = field(default=0, metadata=about(natural))
    resume: bool = field(default=True, metadata=about(switch))
    progress: bool = field(default=True, metadata=about(switch))


@dataclass(frozen=True)
class ExtendResult:
    """What `longrope.extend` made.

    Attributes
    ----------
    model
        The extended model, its tiers by position applied; the given one where no weights changed.
    tiers
        The tiers.
    measured
        Perplexity by range of positions: of the model as it was, and after each stage.
    folder
        The folder of the run; `longrope.load(folder / "model")` gives the model back.
    plan
        What was done.
    """

    model: nn.Module
    tiers: Tiers
    measured: Measured
    folder: Path
    plan: Plan


@ranks.on_all_ranks
@torch.inference_mode(False)
@from_keywords(ExtendArguments)
def extend(model: nn.Module, documents: Iterable[Any], options: ExtendArguments) -> ExtendResult:
    """Extend a model's context window: search, fine-tuning, second search, recovery, export.

    A run is a plan of stages. A *search* finds tiers of rescale factors for its length, starting
    from those that the weights were last trained under. *Fine-tuning* trains the weights under the
    tiers of a search. *Recovery* searches tiers for short texts again, weights untouched. After
    each stage, perplexity is measured by range of positions on documents that no stage sees.

    Killed at any moment, the same call goes on: no finished stage is done again, a search goes on
    by its journal and fine-tuning by its last complete checkpoint. The weights in the end are those
    of an uninterrupted run, to the bit, on the same machine with as many threads and the same torch
    and `save_steps`.

    Parameters
    ----------
    model
        A causal language model that `longrope.apply` supports, without factors applied. Its weights
        are not changed: they are trained in a copy. Where no stage trains, it is itself the model
        of the result, with the tiers applied; `longrope.remove` takes them out again.
    documents
        1-D token ids of any length, see `longrope.load_data`. A search takes those that are at
        least as long as its window; so does fine-tuning, unless it packs them. Those of less than 2
        tokens are left out, with a warning.
    target_length
        The window to reach, in tokens.
    out
        The folder of the run: `config.json`, `journal.jsonl`, a folder for each stage under
        `stages`, then `tiers.json`, `table.md`, `model`, which `longrope.load`, plain transformers
        and vLLM read, and `report.html` with `results.csv` and plots.
    finetune
        None: no training, one search. A `longrope.FinetuneConfig`: train so, where `stages` does
        not say otherwise.
    stages
        What to do: None (by the ratio of the lengths), the name of a recipe (`"longrope-llama2"`,
        `"longrope-mistral"`, `"longrope2"`), a TOML file with `[[stages]]`, or a list of such
        tables. See docs/extend.md.
    held_out
        Documents for the table, each at least `target_length` long. None: one in ten of `documents`
        that are, drawn with `seed`, at least one.
    test_windows
        At most so many windows of `target_length` tokens, each of another document, are measured
        after each stage; drawn with `seed`.
    tokenizer
        To save beside the model; None: the files of the folder that the model came from.
    seed
        Of the documents that are held out, and of stages that name none.
    resume
        False: move an earlier run in `out` aside, and start again.
    progress
        Whether to show progress bars.

    Returns
    -------
    ExtendResult

    Raises
    ------
    ValueError
        In one sentence, before anything is written: lengths that do not grow, too little text, a
        model that cannot be trained, the folder of another plan. Later: a loss that is not finite,
        with the rows of the step and the last good checkpoint.
    OSError
        In one sentence, where the disk is full; the same call goes on when there is room.
    """
    job = ranks.current()
    plan, kept, held_out = prepared(model, documents, options)
    head = folder.header(plan, model, kept, held_out)
    job.check_same(head)
    work = Work(plan, model, kept, held_out, Path(options.out), options.progress, job)
    state = State(model)
    with (
        folder.no_bars(),
        folder.opened(work.out, head, options.resume, job, dtype_note(model)) as journal,
    ):
        rows = []
        if journal.pending:
            rows.append(row_from_json(journal.pending[0]["row"]))
            journal.skip(1)
        else:
            rows.append(work.measured(ORIGINAL, state))
            journal.append([{"stage": ORIGINAL, "row": row_as_json(rows[0])}])
        for number, stage in enumerate(plan.stages):
            if journal.pending:
                entry = journal.pending[0]
                finished = plan.stages[number + 1 : number + len(journal.pending)]
                replaced = any(isinstance(later, FinetuneStage) for later in finished)
                take_stage(work, stage, state, None if replaced else entry.get("weights"))
                rows.append(row_from_json(entry["row"]))
                journal.skip(1)
                continue
            entry = run_stage(work, stage, state)
            rows.append(work.measured(f"{stage.name}: {_words(stage)}", state))
            journal.append([entry | {"row": row_as_json(rows[-1])}])
        measured = table_of(rows, work.ranges, held_out)
        work.job.by_first(lambda: _publish(work, state, measured, options.tokenizer, journal))
        work.job.by_first(lambda: finish(work))
    return ExtendResult(apply(state.model, state.tiers), state.tiers, measured, work.out, plan)


def prepared(
    model: nn.Module, documents: Iterable[Any], options: ExtendArguments
) -> tuple[Plan, list[torch.Tensor], list[torch.Tensor]]:
    """Check everything that can be checked before a run.

    Returns the plan, the documents for the stages, and the excerpts for the table.
    """
    processes = ranks.processes()
    told = int(os.environ.get("WORLD_SIZE", "1"))
    # accelerate takes part in a job that says so in the environment, and in no other.
    if told != processes or (told > 1 and "LOCAL_RANK" not in os.environ):
        raise ValueError(
            "extend: expected a job that torchrun started and that all have joined "
            f"(torch.distributed.init_process_group), got WORLD_SIZE={told}, "
            f"LOCAL_RANK={os.environ.get('LOCAL_RANK')} and {processes} joined"
        )
    settings = rope_settings(model)
    plan = make_plan(
        settings.loaded_length, options.target_length, options.finetune, options.stages,
        options.seed,
    )  # fmt: skip
    if isinstance(decoder(model).rotary_emb, (RescaledRotaryEmbedding, TieredRotaryEmbedding)):
        raise ValueError(
            "model: expected a model without factors applied (longrope.remove), got one with"
        )
    if settings.loaded is None:
        raise ValueError(
            f'model: expected a rope scaling that can be extended, got "{settings.rope_type}"'
        )
    given = _with_tokens(documents, vocabulary(model))
    target = plan.target_length
    if options.held_out is None:
        kept, held = _held_out(given, target, options.seed)
    else:
        held = as_documents(
            options.held_out, min_length=target, vocab_size=vocabulary(model), name="held_out"
        )
        kept = _others(given, held)
        if len(kept) < len(given):
            raise ValueError(
                "held_out: expected documents that no stage sees, got "
                f"{len(given) - len(kept)} that are among documents too"
            )
    kept = like(documents, kept)
    check_stages(model, plan, kept, processes)
    return plan, kept, like(documents, excerpts(held, target, options.test_windows, options.seed))


def _with_tokens(documents: Iterable[Any], vocab_size: int | None) -> Sequence[torch.Tensor]:
    """Return the documents with a token to predict; a warning counts those that are left out."""
    given = as_documents(documents, min_length=0, vocab_size=vocab_size)
    kept = [document for document in given if len(document) >= 2]
    if len(kept) < len(given) and ranks.current().first:
        warn(
            f"documents: {len(given) - len(kept)} of {len(given)} are shorter than 2 tokens and "
            "left out"
        )
    return like(documents, kept)


def _held_out(
    documents: Sequence[torch.Tensor], target: int, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the documents for the stages and those for the table."""
    long = [index for index, document in enumerate(documents) if len(document) >= target]
    if len(long) < 2:
        raise ValueError(
            f"documents: expected at least 2 of {target} tokens or more, one for the table, got "
            f"{len(long)} (of {len(documents)}, the longest {max(map(len, documents), default=0)})"
        )
    random = np.random.default_rng([seed, 2])
    chosen = random.choice(long, max(1, len(long) // HELD_OUT), replace=False).tolist()
    held = [documents[index] for index in sorted(chosen)]
    kept = _others(documents, held)
    copies = len(documents) - len(held) - len(kept)
    if copies and ranks.current().first:
        warn(f"documents: left out {copies} that are copies of one held out for the table")
    return kept, held


def _others(documents: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the documents that are none of those held out, and no copy of one."""
    begins, known = {_begin(document) for document in held}, {digest(d) for d in held}
    return [d for d in documents if _begin(d) not in begins or digest(d) not in known]


def _begin(document: torch.Tensor) -> tuple[int, ...]:
    """Return a length and a few tokens, by which most documents differ without a hash of them."""
    return len(document), *document[:32].tolist()


def _words(stage: Stage) -> str:
    if isinstance(stage, RecoverStage):
        return f"recovered at {', '.join(map(str, stage.lengths))}"
    if isinstance(stage, FinetuneStage):
        return f"{stage.config.steps} steps of {stage.length} tokens"
    return f"searched for {stage.length} tokens"


def _publish(work: Work, state: State, measured: Measured, tokenizer: Any, journal: Any) -> None:
    """Write what a finished run leaves, or what is gone of it: tiers, table, model."""
    table, tiers, model = (work.out / n for n in (folder.TABLE, folder.TIERS, folder.MODEL))
    fresh = not journal.pending
    if fresh or not table.is_file():
        write_text(table, measured.table() + "\n")
    if fresh or not tiers.is_file():
        state.tiers.save(tiers)
    if fresh or not model.is_dir():
        if model.exists():  # written, but the journal does not say so
            shutil.rmtree(model)
        given: Any = state.tiers
        if len(given) == 1:
            given = for_every_position(given[0], work.plan.window)
        found = {"plan": json.loads(json.dumps(work.plan.as_dict()))}
        last = state.tiers[-1].target_length
        if state.trained is not None and state.trained[-1].target_length < last:
            found["stage_one"] = on_top_of(state.trained[-1], last)
        export(
            state.model, model, given, drop_start_tokens=True, tokenizer=tokenizer,
            measured=measured, found=found,
        )  # fmt: skip
        journal.append([{"stage": folder.EXPORT}])
