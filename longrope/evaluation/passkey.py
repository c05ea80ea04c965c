"""Passkey retrieval: does a model find five digits that its context said once?

The prompt is that of LongRoPE (arXiv 2402.13753, section 4.2), after Mohtashami and Jaggi (arXiv
2305.16300): filler sentences with a key somewhere among them, and the question at the end. The
ancestor of the published figures is LongLoRA's script; `protocol="longlora"` cuts as it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from longrope._validation import choice, count, natural
from longrope.errors import NotFiniteError
from longrope.evaluation.generation import check_generates
from longrope.evaluation.memory import plan_batches
from longrope.evaluation.modes import evaluating
from longrope.evaluation.nll import NextTokenNLL
from longrope.evaluation.passkey_result import Passkey, Trial
from longrope.evaluation.perplexity import may_be_cut
from longrope.evaluation.prompts import PromptTokens, check_lengths
from longrope.patching.attention import kernel_attention
from longrope.patching.mlp import inplace_mlps
from longrope.runs.progress import bar

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"

PROTOCOLS = ("longrope", "longlora")
#: LongLoRA's keys are uniform in [1, 50000].
_LONGLORA_KEYS = 50000


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The token ids of a prompt with its answer at the end, and what it asks."""

    ids: list[int]
    answer: int  # how many of the ids are the answer
    key: str
    depth: float


def passkey(
    model: nn.Module,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    trials: int = 10,
    seed: int = 0,
    depths: int = 10,
    protocol: str = "longrope",
    bos: str | bool | int = "auto",
    batch_size: int | None = None,
    progress: bool = False,
) -> Passkey:
    """Measure passkey retrieval at several lengths.

    A trial is right where greedy generation, for as many tokens as the key has, gives exactly the
    key. Whether it would is read off one pass: the key stands at the end of the prompt, and greedy
    generation gives it where each of its tokens is the likeliest after those before. The mean NLL
    of the key's tokens comes with it, which still tells two models apart that both fail. Prompts go
    through the model once, in chunks where they are long, on plain models and under factors alike.

    Parameters
    ----------
    model
        A Hugging Face causal language model, as it stands (see `longrope.apply`).
    tokenizer
        Its tokenizer; None: the model reads bytes. Also a function from `str` to token ids.
    lengths
        Tokens of a prompt together with its answer, BOS included. With `"longrope"` every prompt
        has exactly that many, whatever the tokenizer: the filler is cut between tokens.
    trials
        Prompts of each length.
    seed
        Of keys and places. A trial is the same whatever else is measured beside it.
    depths
        Trial `t` has its key at a random place in part `t % depths` of so many equal parts of the
        filler. 1 is the paper's protocol: anywhere.
    protocol
        `"longrope"`: five digits, as above. `"longlora"`: a key from 1 to 50000 anywhere in filler
        that is cut between characters, so prompts may be some tokens shorter than the length (the
        result says how many they have); `depths` does not matter.
    bos
        As in `longrope.perplexity`.
    batch_size
        Prompts of one forward pass; None: from the memory that is free.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    Passkey
        `result.accuracy(length)` with its interval, `.nll(length)`, every trial in `.trials`;
        `print(result)` shows a table, `.save_csv(path)` and `.plot(path)` write files.

    Raises
    ------
    ValueError
        If an argument is out of range, a length has no room for the prompt without filler, the
        model cannot generate, or its NLL is not finite.
    """
    check_generates(model)
    wanted, trials, seed, depths = check_arguments(lengths, trials, seed, depths, protocol)
    if batch_size is not None:
        count("batch_size", batch_size)
    tokens = PromptTokens(tokenizer, model, bos)
    make = {"longrope": token_exact, "longlora": cut_by_characters}[protocol]
    prompts = [
        (length, make(tokens, length, depths, trial, _random(seed, length, trial)))
        for length in wanted
        for trial in range(trials)
    ]
    measured = []
    with (
        bar(len(prompts), "right", shown=progress) as update,
        evaluating(model),
        kernel_attention(model),
        inplace_mlps(model),
    ):
        for batch, chunk in _batches(model, prompts, trials, batch_size):
            done = _scored(NextTokenNLL(model, chunk), batch)
            measured += done
            read = sum(len(prompt.ids) for _, prompt in batch)
            right = sum(trial.right for trial in measured)
            update(len(done), read, f"{right} of {len(measured)}")
    return Passkey(tuple(measured), protocol, seed)


def check_arguments(
    lengths: Sequence[int], trials: int, seed: int, depths: int, protocol: str
) -> tuple[list[int], int, int, int]:
    """Return these arguments of `passkey` but the last, each length once; no model is needed.

    `ValueError` for one that is out of range.
    """
    choice("protocol", protocol, PROTOCOLS)
    wanted = check_lengths(lengths)
    return wanted, count("trials", trials), natural("seed", seed), count("depths", depths)


def check_passkey(tokens: PromptTokens, length: int) -> None:
    """Refuse in one sentence a length that a prompt does not fit into."""
    token_exact(tokens, length, 1, 0, _random(0, length, 0))


def token_exact(
    tokens: PromptTokens, length: int, depths: int, trial: int, random: np.random.Generator
) -> Prompt:
    """Return a prompt of exactly `length` tokens with its key in part `trial % depths`.

    The parts are encoded apart, so that the filler can be cut between any two tokens.
    """
    key = "".join(map(str, random.integers(0, 10, size=5)))
    share = (trial % depths + random.random()) / depths
    task, line = tokens(TASK + "\n"), tokens("\n" + KEY.format(key=key) + "\n")
    question, answer = tokens.split("\n" + QUESTION, " " + key)
    room = length - sum(map(len, (tokens.start, task, line, question, answer)))
    if room < 0:
        raise ValueError(
            f"lengths: expected at least {length - room} tokens, which the prompt has without "
            f"filler, got {length}"
        )
    unit = tokens(FILLER + " ")
    filler = unit * (room // max(1, len(unit)) + 1)
    before = round(share * room)
    ids = [*tokens.start, *task, *filler[:before], *line, *filler[: room - before], *question]
    return Prompt(ids + answer, len(answer), key, before / max(1, room))


def cut_by_characters(
    tokens: PromptTokens, length: int, depths: int, trial: int, random: np.random.Generator
) -> Prompt:
    """Return LongLoRA's prompt with the most characters of filler that `length` tokens hold."""
    key = str(random.integers(1, _LONGLORA_KEYS, endpoint=True))
    share = random.random()

    def made(characters: int) -> tuple[list[int], list[int]]:
        filler = (FILLER + " ") * (characters // len(FILLER) + 1)
        before = round(share * characters)
        lines = [TASK, filler[:before], KEY.format(key=key), filler[: characters - before]]
        question, answer = tokens.split("\n".join([*lines, QUESTION]), " " + key)
        return [*tokens.start, *question], answer

    def fits(characters: int) -> bool:
        return sum(map(len, made(characters))) <= length

    if not fits(0):
        raise ValueError(
            f"lengths: expected at least {sum(map(len, made(0)))} tokens, which the prompt has "
            f"without filler, got {length}"
        )
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    before, answer = made(low)
    return Prompt(before + answer, len(answer), key, share)


def _random(seed: int, length: int, trial: int) -> np.random.Generator:
    return np.random.default_rng((seed, length, trial))


def _batches(model: nn.Module, prompts: list, trials: int, batch_size: int | None):
    """Yield prompts that go through the model together, and the tokens of a chunk of them.

    Only prompts of one size, with answers of one size, share a pass: there is no padding.
    """
    groups: dict[tuple[int, int, int], list[tuple[int, Prompt]]] = {}
    for length, prompt in prompts:
        groups.setdefault((length, len(prompt.ids), prompt.answer), []).append((length, prompt))
    for (_, size, _), group in groups.items():
        layout = plan_batches(
            model, size, trials, rows=batch_size, cut=may_be_cut(model), name="lengths"
        )
        for start in range(0, len(group), layout.rows):
            yield group[start : start + layout.rows], layout.chunk


def _scored(score: NextTokenNLL, batch: list[tuple[int, Prompt]]) -> list[Trial]:
    ids = torch.tensor([prompt.ids for _, prompt in batch])
    nll, likeliest = score.answers(ids, batch[0][1].answer)
    means, right = nll.double().mean(1).tolist(), likeliest.all(1).tolist()
    for mean, (length, _) in zip(means, batch, strict=True):
        if not np.isfinite(mean):
            raise NotFiniteError(
                f"model: the NLL of a key in a prompt of {length} tokens is {mean}"
            )
    return [
        Trial(length, len(prompt.ids), prompt.depth, prompt.key, hit, mean)
        for (length, prompt), mean, hit in zip(batch, means, right, strict=True)
    ]
