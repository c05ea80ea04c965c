"""RULER-synthetic-6: RULER's six tasks that need no download, on any model and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope._validation import choice, count, natural, switch
from longrope.evaluation.generation import check_generates, greedy
from longrope.evaluation.memory import plan_batches
from longrope.evaluation.modes import evaluating
from longrope.evaluation.nll import NextTokenNLL
from longrope.evaluation.perplexity import may_be_cut
from longrope.evaluation.prompts import PromptTokens, check_lengths
from longrope.evaluation.ruler_result import Ruler, Scored
from longrope.evaluation.ruler_tasks import RULER_TASKS, TASKS, Sample, Task
from longrope.patching.attention import kernel_attention
from longrope.patching.mlp import inplace_mlps
from longrope.runs.progress import bar


def ruler(
    model: nn.Module,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    tasks: Sequence[str] = RULER_TASKS,
    samples: int = 100,
    seed: int = 0,
    chat: bool = False,
    bos: str | bool | int = "auto",
    progress: bool = False,
) -> Ruler:
    """Measure RULER's six synthetic tasks at several lengths.

    Needles by name (`niah_single_1`, `niah_multikey_2`, `niah_multikey_3`), a chain of variables
    (`vt`), common words (`cwe`) and frequent words (`fwe`). The prompt and the tokens that may be
    generated fit the length together, with the most haystack that fits. Generation is greedy, from
    one prefill in chunks; a sample's score is the share of the expected strings that it contains,
    upper and lower case alike. The tasks are made for instruct models: a small base model scores 0.

    Parameters
    ----------
    model
        A Hugging Face causal language model with `generate`, as it stands (see `longrope.apply`).
    tokenizer
        Its tokenizer; None: the model reads bytes.
    lengths
        Tokens of prompt and answer together.
    tasks
        Names from `longrope.RULER_TASKS`.
    samples
        Prompts of each task and length; the paper has 500.
    seed
        Of the prompts. A prompt is the same whatever else is measured beside it.
    chat
        Put the prompt into the tokenizer's chat template; the answer begins behind its head.
    bos
        As in `longrope.perplexity`; not with `chat`, whose template has its own.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    Ruler
        `result.score(task, length)` and `.average(length)` with their intervals,
        `.effective_length()`; `print(result)` shows a table, `.save_csv` and `.plot` write files.

    Raises
    ------
    ValueError
        If an argument is out of range, a length is shorter than the frame of a task, the model
        cannot generate, or the tokenizer cannot decode or has no chat template.
    """
    check_generates(model)
    wanted = check_lengths(lengths)
    if isinstance(tasks, str) or not isinstance(tasks, Iterable) or not tasks:
        raise ValueError(f"tasks: expected names of longrope.RULER_TASKS, got {tasks!r}")
    tasks = tuple(dict.fromkeys(choice("tasks", task, RULER_TASKS) for task in tasks))
    samples, seed = count("samples", samples), natural("seed", seed)
    tokens = PromptTokens(tokenizer, model, False if switch("chat", chat) else bos)
    frame = _frame(tokenizer, chat)
    check_ruler(tokens, wanted[0], tasks, frame)
    scored = []
    with (
        bar(len(tasks) * len(wanted) * samples, "score", shown=progress) as update,
        evaluating(model),
        kernel_attention(model),
        inplace_mlps(model),
    ):
        for length in wanted:
            for name in tasks:
                prompts = list(_prompts(tokens, frame, name, length, samples, seed))
                for batch, chunk in _batches(model, prompts, length):
                    ids = torch.tensor([ids for ids, _ in batch])
                    written = greedy(NextTokenNLL(model, chunk), ids, TASKS[name].new_tokens)
                    for (prompt, sample), answer in zip(batch, written, strict=True):
                        text = tokens.decode(answer)
                        score = contained(text, sample.references)
                        scored.append(
                            Scored(name, length, len(prompt), score, sample.references, text)
                        )
                    mean = np.mean([each.score for each in scored])
                    update(len(batch), ids.numel(), f"{100 * mean:.1f}")
    return Ruler(tuple(scored), seed)


def check_ruler(
    tokens: PromptTokens,
    length: int,
    tasks: Sequence[str] = RULER_TASKS,
    frame: tuple[str, str] = ("", ""),
) -> None:
    """Refuse now, in one sentence, what would end a measurement later.

    A length too short for a task and its answer, and a tokenizer that cannot read what the model
    writes.
    """
    tokens.decode(tokens(" a"))
    for name in tasks:
        next(_prompts(tokens, frame, name, length, 1, 0))


def contained(prediction: str, references: Sequence[str]) -> float:
    """Return the share of the references that a prediction contains, in any case of letters."""
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def _frame(tokenizer: Any, chat: bool) -> tuple[str, str]:
    """Return what stands before and behind a prompt: the chat template, or nothing."""
    if not chat:
        return "", ""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat: expected a tokenizer with a chat template, got one without")
    place = "PROMPT"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": place}], tokenize=False, add_generation_prompt=True
    )
    before, found, behind = text.partition(place)
    if not found:
        raise ValueError("chat: expected a chat template that holds the prompt, got one without")
    return before, behind


def _prompts(
    tokens: PromptTokens,
    frame: tuple[str, str],
    name: str,
    length: int,
    samples: int,
    seed: int,
) -> Iterator[tuple[list[int], Sample]]:
    """Yield the prompts of a task at a length, each with the most units that fit.

    As in RULER the first prompt says how many fit; another one that is longer gets fewer.
    """
    task, number = TASKS[name], RULER_TASKS.index(name)

    def made(index: int, units: int) -> tuple[list[int], Sample]:
        random = np.random.default_rng((seed, number, length, index))
        sample = task.make(units, length, random)
        return [*tokens.start, *tokens(_framed(sample, frame, name))], sample

    units = _most_units(made, task, name, length)
    for index in range(samples):
        for fewer in range(units, task.least - 1, -1):
            ids, sample = made(index, fewer)
            if len(ids) + task.new_tokens <= length:
                break
        else:
            raise _too_short(name, length, len(ids) + task.new_tokens)
        yield ids, sample


#: Where the answer's first words begin, which stand behind the head of a chat's answer.
_PREFIX = {"vt": " Answer: ", "cwe": " Answer: ", "fwe": " Answer: "}


def _framed(sample: Sample, frame: tuple[str, str], name: str) -> str:
    before, behind = frame
    if not (before or behind):
        return sample.prompt
    cut = sample.prompt.rindex(_PREFIX.get(name, " The special magic "))
    return before + sample.prompt[:cut] + behind + sample.prompt[cut:].lstrip()


def _most_units(made: Any, task: Task, name: str, length: int) -> int:
    def fits(units: int) -> bool:
        return len(made(0, units)[0]) + task.new_tokens <= length

    low = task.least
    if not fits(low):
        raise _too_short(name, length, len(made(0, low)[0]) + task.new_tokens)
    high = 2 * low
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _too_short(name: str, length: int, needed: int) -> ValueError:
    return ValueError(
        f"lengths: expected at least {needed} tokens for the task {name} and its answer, "
        f"got {length}"
    )


def _batches(
    model: nn.Module, prompts: list[tuple[list[int], Sample]], length: int
) -> Iterator[tuple[list[tuple[list[int], Sample]], int | None]]:
    """Yield prompts of one size, so that there is no padding, and the tokens of a chunk."""
    layout = plan_batches(model, length, len(prompts), cut=may_be_cut(model), name="lengths")
    groups: dict[int, list[tuple[list[int], Sample]]] = {}
    for ids, sample in prompts:
        groups.setdefault(len(ids), []).append((ids, sample))
    for group in groups.values():
        for start in range(0, len(group), layout.rows):
            yield group[start : start + layout.rows], layout.chunk
