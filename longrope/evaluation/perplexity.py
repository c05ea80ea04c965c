"""Perplexity of a causal language model over long documents, by sliding windows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from longrope import _validation
from longrope._numbers import perplexity_of
from longrope.documents import as_documents
from longrope.errors import NotFiniteError
from longrope.evaluation.memory import plan_batches
from longrope.evaluation.modes import evaluating, vocabulary
from longrope.evaluation.nll import NextTokenNLL
from longrope.evaluation.start import bos_token, with_bos, without_bos
from longrope.patching.attention import has_kernel_attention, kernel_attention
from longrope.patching.embedding import RescaledRotaryEmbedding
from longrope.patching.families import decoder
from longrope.patching.mlp import inplace_mlps
from longrope.patching.notices import warn_of_window
from longrope.patching.settings import LENGTH_DEPENDENT, rope_settings
from longrope.patching.tiered import TieredRotaryEmbedding
from longrope.runs.progress import bar


class Window(NamedTuple):
    """Tokens `start` to `end` of document `document`, of which the last `scored` are scored.

    Counted without a BOS in front of the document.
    """

    document: int
    start: int
    end: int
    scored: int


class Perplexity(float):
    """A perplexity, with those of ranges of positions beside it.

    Attributes
    ----------
    by_range
        Of each range that was asked for; NaN where it had no scored token.
    tokens
        How many tokens were scored.
    """

    by_range: tuple[float, ...]
    tokens: int

    def __new__(cls, value: float, by_range: tuple[float, ...] = (), tokens: int = 0) -> Perplexity:
        """Attach what is known beside the value."""
        made = super().__new__(cls, value)
        made.by_range, made.tokens = by_range, tokens
        return made


def perplexity(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    length: int,
    stride: int = 256,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    bos: str | bool | int = "auto",
    ranges: Sequence[tuple[int, int]] | None = None,
    progress: bool | Callable[[int, int, float], None] = False,
) -> Perplexity:
    """Measure the perplexity of documents in sliding windows of `length` tokens.

    Windows start every `stride` tokens until one reaches the document's end (the last one may be
    shorter). Each token is scored once, in the first window that holds it, where it has the most
    context; a window's first token has no context there and is never scored by that window. The
    result is `exp(sum of NLL / number of scored tokens)` over all documents, so a long document
    weighs more than a short one. With `bos` a window is that token and `length - 1` tokens of text:
    a model that was trained with BOS leans on it (the attention sink).

    Parameters
    ----------
    model
        A Hugging Face causal language model, as it stands (see `longrope.apply`). Evaluated in
        eval mode without gradients; its training flags are restored.
    documents
        1-D token ids (tensors, arrays or lists), each at least `length` tokens long.
    length
        Window length in tokens, at least 2.
    stride
        Tokens between the starts of windows, 1 to `length`. Smaller is more exact and dearer:
        every token but those of the first window has at least `length - stride` tokens before it.
    samples
        Measure a random sample of this many documents, drawn with `seed`; None: all of them.
    seed
        Seed of the sample.
    batch_size
        Windows of one forward pass; None: from the memory that is free. Long windows may go through
        the model in chunks, with a cache of keys and values.
    bos
        The token in front of every window, which is never scored and not doubled where a document
        has it; the first token after it is scored in a document's first window alone. `"auto"`: the
        one that the tokenizer of `load_data`'s documents adds, if it adds one; for other documents
        the `bos_token_id` of the model's config, if it names one and the vocabulary is more than
        the 256 bytes. True: as `"auto"`, or an error. False: none. A number: this token. Windows
        then start every `min(stride, length - 1)` tokens.
    ranges
        Pairs `(begin, end)`: measure also the tokens at positions `begin` to before `end` of their
        windows. With `stride = length`, as a rule: smaller strides score the last tokens of most
        windows only.
    progress
        True: show a progress bar, in logs and notebooks without widgets a line every half minute;
        or a function that is called after every batch with the windows measured, all windows, and
        the perplexity so far.

    Returns
    -------
    Perplexity
        A float, infinite for a mean NLL beyond 709 nats; `.by_range` holds one for each of `ranges`
        (NaN where it has no scored token), and `.tokens` how many were scored.

    Raises
    ------
    ValueError
        If an argument is out of range, a document is shorter than the window or holds ids outside
        the vocabulary, the keys and values of one window do not fit the free memory, or the model's
        NLL of a window is not finite.
    """
    length, stride, seed, samples, ranges = check_arguments(length, stride, seed, samples, ranges)
    if batch_size is not None:
        batch_size = _validation.integer("batch_size", batch_size, 1)
    if not callable(progress) and progress not in (True, False):
        raise ValueError(f"progress: expected True, False or a function, got {progress!r}")
    start = bos_token(bos, model, documents)
    tokens = as_documents(documents, min_length=length, vocab_size=vocabulary(model))
    tokens = without_bos(tokens, start)
    warn_of_window(model, length)
    chosen = range(len(tokens))
    if samples is not None:
        if samples > len(tokens):
            raise ValueError(f"samples: expected at most {len(tokens)} documents, got {samples}")
        random = np.random.default_rng(seed)
        chosen = sorted(int(i) for i in random.choice(len(tokens), samples, replace=False))

    windows = [
        Window(index, *window)
        for index in chosen
        for window in _text_windows(len(tokens[index]), length, stride, start is not None)
    ]
    # Only windows of one length and one number of scored tokens share a batch: no padding, which
    # models whose factors depend on the actual length would take for text.
    windows.sort(key=lambda w: (w.start - w.end, -w.scored))
    total, count = 0.0, 0
    range_sums, range_counts = np.zeros(len(ranges)), np.zeros(len(ranges), np.int64)
    layout = plan_batches(
        model, length, len(windows), rows=batch_size, cut=may_be_cut(model), name="length"
    )
    with (
        _shown(progress, len(windows)) as show,
        evaluating(model),
        kernel_attention(model),
        inplace_mlps(model),
    ):
        score = NextTokenNLL(model, layout.chunk)
        for batch in _batches(windows, layout.rows):
            ids = [tokens[w.document][w.start : w.end].to(torch.int64) for w in batch]
            ids = with_bos(torch.stack(ids), start)
            scored = batch[0].scored
            if ranges:
                nll = score(ids, scored).double().cpu()
                sums = nll.sum(1).tolist()
                first = ids.shape[1] - scored
                for number, (begin, end) in enumerate(ranges):
                    part = nll[:, max(0, begin - first) : max(0, end - first)]
                    range_sums[number] += float(part.sum())
                    range_counts[number] += part.numel()
            else:
                sums = score.sums(ids, scored)[:, 0].tolist()
            for window, value in zip(batch, sums, strict=True):
                if not math.isfinite(value):
                    raise NotFiniteError(
                        f"model: the NLL of tokens {window.start} to {window.end} of "
                        f"documents[{window.document}] is {value}"
                    )
            total += math.fsum(sums)
            count += scored * len(batch)
            show(len(batch), ids.numel(), perplexity_of(total / count))
    with np.errstate(invalid="ignore", over="ignore"):
        by_range = tuple(np.exp(range_sums / range_counts).tolist())
    return Perplexity(perplexity_of(total / count), by_range, count)


def check_arguments(
    length: int,
    stride: int,
    seed: int,
    samples: int | None,
    ranges: Sequence[tuple[int, int]] | None,
) -> tuple[int, int, int, int | None, list[tuple[int, int]]]:
    """Return these arguments of `perplexity`; no model is needed.

    `ValueError` for one that is out of range.
    """
    length = _validation.integer("length", length, 2)
    stride = _validation.integer("stride", stride, 1)
    if stride > length:
        raise ValueError(f"stride: expected at most the length {length}, got {stride}")
    if samples is not None:
        samples = _validation.integer("samples", samples, 1)
    seed = _validation.seed("seed", seed)
    return length, stride, seed, samples, _checked_ranges(ranges, length)


@contextlib.contextmanager
def _shown(
    progress: bool | Callable[[int, int, float], None], total: int
) -> Iterator[Callable[[int, int, float], None]]:
    """Yield a function of the windows of a batch, their tokens, and the perplexity so far."""
    if callable(progress):
        done = 0

        def tell(windows: int, tokens: int, value: float) -> None:
            nonlocal done
            done += windows
            progress(done, total, value)

        yield tell
    elif progress:
        with bar(total, "perplexity", unit="windows", ends_with_line=False) as update:
            yield lambda windows, tokens, value: update(windows, tokens, f"{value:.4f}")
    else:
        yield lambda windows, tokens, value: None


def _checked_ranges(ranges: Sequence[tuple[int, int]] | None, length: int) -> list[tuple[int, int]]:
    checked = []
    for pair in ranges or ():
        try:
            begin, end = (_validation.integer("ranges", edge, 0) for edge in pair)
        except (TypeError, ValueError):
            raise ValueError(f"ranges: expected pairs of positions, got {pair!r}") from None
        if not begin < end <= length:
            raise ValueError(
                f"ranges: expected begin < end <= the length {length}, got ({begin}, {end})"
            )
        checked.append((begin, end))
    return checked


def _text_windows(size: int, length: int, stride: int, bos: bool) -> Iterator[tuple[int, int, int]]:
    """Return the windows of a text of `size` tokens; with BOS, of `length - 1` tokens beside it."""
    if bos:
        return sliding_windows(size, length - 1, min(stride, length - 1), scores_first=True)
    return sliding_windows(size, length, stride)


def sliding_windows(
    size: int, length: int, stride: int, scores_first: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Yield `(start, end, scored)` of each window of a document of `size` tokens.

    `scored` counts the window's last tokens that no earlier window scores. With `stride = length`
    windows do not overlap, and the first token of each stays unscored; with `scores_first` that of
    the document is scored, by a BOS that stands before it.
    """
    previous_end = 0
    for start in range(0, size, stride):
        end = min(start + length, size)
        unseen = 0 if scores_first and start == 0 else 1
        scored = end - max(previous_end, start + unseen)
        if scored > 0:
            yield start, end, scored
        if end == size:
            return
        previous_end = end


def _batches(windows: list[Window], rows: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in windows:
        shape = (window.end - window.start, window.scored)
        if batch and (
            len(batch) == rows or shape != (batch[0].end - batch[0].start, batch[0].scored)
        ):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def may_be_cut(model: nn.Module) -> bool:
    """Say whether chunks of a window turn by the angles of the whole window.

    The rope types of transformers that look at the longest position so far turn the first chunks of
    a long window by other angles.
    """
    if not has_kernel_attention(model):
        return False
    if isinstance(decoder(model).rotary_emb, (RescaledRotaryEmbedding, TieredRotaryEmbedding)):
        return True
    return rope_settings(model).rope_type not in LENGTH_DEPENDENT
