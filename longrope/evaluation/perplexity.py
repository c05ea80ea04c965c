"""Perplexity of a causal language model over long documents, by sliding windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from longrope import _validation
from longrope.documents import as_documents
from longrope.evaluation.memory import plan_batches
from longrope.evaluation.modes import evaluating, vocabulary
from longrope.evaluation.nll import NextTokenNLL
from longrope.patching.attention import has_kernel_attention, kernel_attention
from longrope.patching.embedding import RescaledRotaryEmbedding
from longrope.patching.families import decoder
from longrope.patching.mlp import inplace_mlps
from longrope.patching.settings import rope_parameters, text_config


class Window(NamedTuple):
    """Tokens `start` to `end` of document `document`, of which the last `scored` are scored."""

    document: int
    start: int
    end: int
    scored: int


def perplexity(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    length: int,
    stride: int = 256,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> float:
    """Measure the perplexity of documents in sliding windows of `length` tokens.

    Windows start every `stride` tokens until one reaches the document's end (the last one may be
    shorter). Each token is scored once, in the first window that holds it, where it has the most
    context; a window's first token has no context there and is never scored by that window. The
    result is `exp(sum of NLL / number of scored tokens)` over all documents, so a long document
    weighs more than a short one.

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

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If an argument is out of range, a document is shorter than the window or holds ids outside
        the vocabulary, the keys and values of one window do not fit the free memory, or the model's
        NLL of a window is not finite.
    """
    length = _validation.integer("length", length, 2)
    stride = _validation.integer("stride", stride, 1)
    if stride > length:
        raise ValueError(f"stride: expected at most the length {length}, got {stride}")
    if batch_size is not None:
        batch_size = _validation.integer("batch_size", batch_size, 1)
    seed = _validation.integer("seed", seed, 0)
    tokens = as_documents(documents, min_length=length, vocab_size=vocabulary(model))
    chosen = range(len(tokens))
    if samples is not None:
        if _validation.integer("samples", samples, 1) > len(tokens):
            raise ValueError(f"samples: expected at most {len(tokens)} documents, got {samples}")
        random = np.random.default_rng(seed)
        chosen = sorted(int(i) for i in random.choice(len(tokens), samples, replace=False))

    windows = [
        Window(index, *window)
        for index in chosen
        for window in sliding_windows(len(tokens[index]), length, stride)
    ]
    # Only windows of one length and one number of scored tokens share a batch: no padding, which
    # models whose factors depend on the actual length would take for text.
    windows.sort(key=lambda w: (w.start - w.end, -w.scored))
    total, count = 0.0, 0
    layout = plan_batches(
        model, length, len(windows), rows=batch_size, cut=_may_be_cut(model), name="length"
    )
    with evaluating(model), kernel_attention(model), inplace_mlps(model):
        score = NextTokenNLL(model, layout.chunk)
        for batch in _batches(windows, layout.rows):
            ids = torch.stack([tokens[w.document][w.start : w.end] for w in batch])
            sums = score.sums(ids, batch[0].scored)[:, 0].tolist()
            for window, value in zip(batch, sums, strict=True):
                if not math.isfinite(value):
                    raise ValueError(
                        f"model: the NLL of tokens {window.start} to {window.end} of "
                        f"documents[{window.document}] is {value}"
                    )
            total += math.fsum(sums)
            count += batch[0].scored * len(batch)
    return math.exp(total / count)


def sliding_windows(size: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(start, end, scored)` of each window of a document of `size` tokens.

    `scored` counts the window's last tokens that no earlier window scores. With `stride = length`
    windows do not overlap, and the first token of each stays unscored.
    """
    previous_end = 0
    for start in range(0, size, stride):
        end = min(start + length, size)
        scored = end - max(previous_end, start + 1)
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


def _may_be_cut(model: nn.Module) -> bool:
    """Say whether chunks of a window turn by the angles of the whole window.

    The rope types of transformers that look at the longest position so far turn the first chunks of
    a long window by other angles.
    """
    if not has_kernel_attention(model):
        return False
    rotary = decoder(model).rotary_emb
    own = str(rope_parameters(text_config(model))["rope_type"])
    return isinstance(rotary, RescaledRotaryEmbedding) or not (
        own == "longrope" or "dynamic" in own
    )
