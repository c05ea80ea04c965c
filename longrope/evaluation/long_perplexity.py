"""LongPPL: perplexity of the tokens alone that need the long context (arXiv 2410.23771)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from longrope._numbers import perplexity_of
from longrope._validation import count, integer, natural
from longrope.documents import as_documents
from longrope.errors import NotFiniteError
from longrope.evaluation.memory import plan_batches
from longrope.evaluation.modes import evaluating, vocabulary
from longrope.evaluation.nll import NextTokenNLL
from longrope.evaluation.perplexity import may_be_cut
from longrope.evaluation.start import bos_token, with_bos, without_bos
from longrope.patching.attention import kernel_attention
from longrope.patching.mlp import inplace_mlps
from longrope.patching.settings import rope_settings
from longrope.report.intervals import bootstrap_interval

#: A key token gains more than this many nats from the long context, and has at least this
#: log-probability there: the paper's alpha and beta.
GAIN, LOG_PROBABILITY = 2.0, -2.0
#: Tokens that share the start of their short context, in the paper; fewer for a small window.
BLOCK = 1024
#: With fewer key tokens there is nothing to average.
LEAST_KEYS = 10


class LongPerplexity(float):
    """A LongPPL, with what it stands on beside it.

    Attributes
    ----------
    interval
        The 95 % interval, by a bootstrap over blocks of tokens.
    keys
        For each window the places of its key tokens, counted without BOS.
    key_tokens, tokens
        How many key tokens there are, and how many tokens could have been some.
    perplexity
        The perplexity of all of the latter.
    """

    interval: tuple[float, float]
    keys: tuple[tuple[int, ...], ...]
    key_tokens: int
    tokens: int
    perplexity: float


class _Windows(NamedTuple):
    """Windows int64 `[S, N]` of text, the BOS before them, and how they are cut."""

    ids: torch.Tensor
    bos: int | None
    short: int
    block: int


def long_perplexity(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    length: int,
    short: int | None = None,
    block: int | None = None,
    evaluator: nn.Module | None = None,
    keys: Sequence[Sequence[int]] | None = None,
    samples: int | None = None,
    seed: int = 0,
    bos: str | bool | int = "auto",
) -> LongPerplexity:
    """Measure `exp(-mean log-probability)` of the tokens that the long context makes likely.

    With `l` the log-probability of a token given all before it in its window, and `s` given the
    last `short` tokens, key tokens have `l - s > 2` and `l > -2`. Blocks of tokens share a short
    context: those from `start + short` to `start + short + block` read from `start` on.

    Parameters
    ----------
    model
        A Hugging Face causal language model, as it stands (see `longrope.apply`).
    documents
        1-D token ids, each of at least `length`; cut into windows that do not overlap, the rest
        left out. Take text that no search has seen.
    length
        Tokens of a window, BOS included.
    short
        Tokens of short context, the paper's K (4096 there); None: the model's original window.
    block
        Tokens of a block; None: 1024 as in the paper, or a quarter of `short` if that is less.
    evaluator
        The model that says which tokens are key, with the same tokenizer; a strong one in the
        paper. None: the model itself. Then models that use long contexts differently have
        different key tokens: to compare them give `keys`.
    keys
        Key tokens found before, `result.keys` for the same documents and lengths.
    samples
        Take a random sample of this many windows, drawn with `seed`; None: all.
    seed
        Of the sample and of the bootstrap.
    bos
        As in `longrope.perplexity`; it stands before short contexts too.

    Returns
    -------
    LongPerplexity
        A float; `.interval`, `.key_tokens`, `.tokens`, `.perplexity` and `.keys` beside it.

    Raises
    ------
    ValueError
        If an argument is out of range, a document is too short, there are fewer than 10 key
        tokens, or the NLL of a token is not finite.
    """
    length, seed = integer("length", length, 2), natural("seed", seed)
    short = rope_settings(model).original_length if short is None else count("short", short)
    block = min(BLOCK, max(1, short // 4)) if block is None else count("block", block)
    start = bos_token(bos, model, documents)
    text = length - (start is not None)
    if text <= short:
        raise ValueError(
            f"length: expected more tokens than the short context of {short}, got {length}"
        )
    windows = _Windows(
        _cut(model, documents, length, text, start, samples, seed), start, short, block
    )
    full = _full(model, windows)
    most, known = int(windows.ids.max()), None if evaluator is None else vocabulary(evaluator)
    if known is not None and most >= known:
        raise ValueError(
            f"evaluator: expected a model with the same tokenizer, got a vocabulary of {known} "
            f"beside the token {most}"
        )
    if keys is None:
        judged = full if evaluator is None else _full(evaluator, windows)
        gain = _short(model if evaluator is None else evaluator, windows) - judged
        mask = (gain > GAIN) & (judged < -LOG_PROBABILITY)
    else:
        mask = _mask(keys, full.shape, short)
    found = int(mask.sum())
    if found < LEAST_KEYS:
        raise ValueError(
            f"documents: expected at least {LEAST_KEYS} key tokens, got {found} among {mask.size}; "
            "take more or longer documents"
        )
    made = LongPerplexity(perplexity_of(full[mask].mean()))
    made.keys = tuple(tuple((np.flatnonzero(row) + short).tolist()) for row in mask)
    made.key_tokens, made.tokens = found, mask.size
    made.perplexity = perplexity_of(full.mean())
    made.interval = _interval(full, mask, block, seed)
    return made


def _cut(
    model: nn.Module,
    documents: Iterable[Any],
    length: int,
    text: int,
    bos: int | None,
    samples: int | None,
    seed: int,
) -> torch.Tensor:
    tokens = as_documents(documents, min_length=length, vocab_size=vocabulary(model))
    windows = [
        document[start : start + text].to(torch.int64)
        for document in without_bos(tokens, bos)
        for start in range(0, len(document) - text + 1, text)
    ]
    if samples is not None:
        if count("samples", samples) > len(windows):
            raise ValueError(f"samples: expected at most {len(windows)} windows, got {samples}")
        random = np.random.default_rng(seed)
        chosen = sorted(random.choice(len(windows), samples, replace=False).tolist())
        windows = [windows[index] for index in chosen]
    return torch.stack(windows)


def _full(model: nn.Module, windows: _Windows) -> np.ndarray:
    """Return the NLL of the tokens from `short` on given all before them, float64 `[S, n]`."""
    scored = windows.ids.shape[1] - windows.short
    return _nll(model, with_bos(windows.ids, windows.bos), scored)


def _short(model: nn.Module, windows: _Windows) -> np.ndarray:
    """Return the NLL of the same tokens given the last `short` ones, float64 `[S, n]`."""
    ids, bos, short, block = windows
    parts = []
    for start in range(0, ids.shape[1] - short, block):
        part = ids[:, start : start + short + block]
        parts.append(_nll(model, with_bos(part, bos), part.shape[1] - short))
    return np.concatenate(parts, axis=1)


def _nll(model: nn.Module, ids: torch.Tensor, scored: int) -> np.ndarray:
    layout = plan_batches(model, ids.shape[1], len(ids), cut=may_be_cut(model), name="length")
    with evaluating(model), kernel_attention(model), inplace_mlps(model):
        score = NextTokenNLL(model, layout.chunk)
        parts = [score(rows, scored).double().cpu() for rows in ids.split(layout.rows)]
    nll = torch.cat(parts).numpy()
    if not np.isfinite(nll).all():
        raise NotFiniteError(
            f"model: the NLL of a token in a window of {ids.shape[1]} is not finite"
        )
    return nll


def _mask(keys: Sequence[Sequence[int]], shape: tuple[int, ...], short: int) -> np.ndarray:
    mask = np.zeros(shape, bool)
    if not hasattr(keys, "__len__"):
        raise ValueError(f"keys: expected the places of each window, got {type(keys).__name__}")
    if len(keys) != len(mask):
        raise ValueError(f"keys: expected those of {len(mask)} windows, got {len(keys)}")
    for row, places in zip(mask, keys, strict=True):
        within = [
            integer("keys", int(p) if isinstance(p, np.integer) else p, 0) - short for p in places
        ]
        if within and not (min(within) >= 0 and max(within) < len(row)):
            raise ValueError(
                f"keys: expected places from {short} to {short + len(row) - 1}, got "
                f"{min(places)} to {max(places)}"
            )
        row[within] = True
    return mask


def _interval(full: np.ndarray, mask: np.ndarray, block: int, seed: int) -> tuple[float, float]:
    """Return the interval of the mean over key tokens, blocks of tokens drawn with replacement.

    Tokens of one block share their text, so they are no independent draws.
    """
    sums, counts = [], []
    for start in range(0, full.shape[1], block):
        part = slice(start, start + block)
        sums += np.where(mask[:, part], full[:, part], 0).sum(1).tolist()
        counts += mask[:, part].sum(1).tolist()
    with_keys = [(total, n) for total, n in zip(sums, counts, strict=True) if n]
    low, high = bootstrap_interval(
        [total for total, _ in with_keys], seed=seed, weights=[n for _, n in with_keys]
    )
    return perplexity_of(low), perplexity_of(high)
