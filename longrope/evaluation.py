"""Perplexity of a causal language model over long documents, by sliding windows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from longrope import _validation, ops
from longrope.documents import as_documents

#: Tokens of one forward pass on a CPU. Larger batches fall out of its caches: with the packaged
#: model 4096 tokens were 6 % faster than 2048 and 18 % faster than 8192. On a GPU the batch is
#: sized from the memory that is free.
CPU_TOKENS_PER_BATCH = 4096


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
        Windows of one forward pass; None: from the memory that is free.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If an argument is out of range, a document is shorter than the window or holds ids outside
        the vocabulary, or the model's NLL of a window is not finite.
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
    with evaluating(model):
        score = NextTokenNLL(model)
        rows = batch_size or rows_per_batch(model, length)
        for batch in _batches(windows, rows):
            ids = torch.stack([tokens[w.document][w.start : w.end] for w in batch])
            sums = score(ids, batch[0].scored).double().sum(1).tolist()
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


class NextTokenNLL:
    """The negative log-likelihood of tokens given those before them, without all the logits.

    `NextTokenNLL(model)(ids, scored)`: ids int64 `[B, N]`, `1 <= scored < N`; returns float32
    `[B, scored]`, the NLL of the last `scored` tokens of each row. Only the hidden states that
    predict them go through the output layer. To be made and used within `evaluating(model)`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.device = next(model.parameters()).device
        self.base, self.head = _base_and_head(model)

    def __call__(self, ids: torch.Tensor, scored: int) -> torch.Tensor:
        ids = ids.to(self.device)
        targets = ids[:, -scored:]
        if self.base is None:
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -scored - 1 : -1]
            nll = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
            )
            return nll.view_as(targets)
        hidden = self.base(input_ids=ids, use_cache=False).last_hidden_state
        rows = hidden[:, -scored - 1 : -1].flatten(0, 1)
        return ops.linear_nll(rows, self.head.weight, targets.flatten()).view_as(targets)


def _base_and_head(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the model below the output layer and that layer, or `(None, None)`.

    Some models do more than one matrix product at the end (a bias, a soft cap, a scale). Whether
    the two parts give the model's own logits is tried on a few tokens, not guessed from its name.
    """
    base = getattr(model, "base_model", None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if base is None or base is model or not isinstance(head, nn.Linear):
        return None, None
    probe = torch.arange(4, device=next(model.parameters()).device)[None]
    try:
        expected = model(input_ids=probe, use_cache=False).logits
        hidden = base(input_ids=probe, use_cache=False).last_hidden_state
        actual = nn.functional.linear(hidden, head.weight)
    except (TypeError, AttributeError, RuntimeError):
        return None, None
    same = expected.shape == actual.shape and torch.allclose(
        expected.float(), actual.float(), rtol=1e-3, atol=1e-3, equal_nan=True
    )
    return (base, head) if same else (None, None)


def vocabulary(model: nn.Module) -> int | None:
    """Return the number of rows of the model's token embedding, None where it has none.

    Raises `ValueError` where this is no module at all.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: expected a Hugging Face causal language model, got {type(model).__name__}"
        )
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    return None if weight is None else weight.shape[0]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without gradients; restore every module's own flag after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def rows_per_batch(model: nn.Module, length: int) -> int:
    """Return how many rows of `length` tokens one forward pass without gradients should take."""
    parameter = next(model.parameters())
    tokens = CPU_TOKENS_PER_BATCH
    if parameter.is_cuda:
        config = getattr(model, "config", None)
        hidden = getattr(config, "hidden_size", None) or 4096
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        # Alive at the widest point of a layer: the residual, its norm (float32 inside), q, k, v
        # and the output (6 x hidden with the float32 copy), and gate, up and their product.
        per_token = parameter.element_size() * (8 * hidden + 3 * inner)
        free, _ = torch.cuda.mem_get_info(parameter.device)
        tokens = int(free * 0.5 / per_token)
    return max(1, tokens // length)
