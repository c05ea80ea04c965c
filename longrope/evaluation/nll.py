"""The negative log-likelihood of tokens given those before them, without all the logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from longrope import ops
from longrope.patching import row_lengths
from longrope.patching.embedding import RescaledRotaryEmbedding
from longrope.patching.families import decoder
from longrope.patching.tier_pass import cache_argument
from longrope.patching.window_cache import differentiable_cache, rewind, window_cache
from longrope.patching.wrappers import called_model, device_of, is_plain, is_sharded


class NextTokenNLL:
    """Scores the last tokens of windows; only the hidden states that predict them meet the head.

    To be made within `evaluating(model)`, and used within it too, but for `backward`.

    Parameters
    ----------
    model
        A causal language model.
    chunk
        Tokens of each window in one forward pass, with a cache of keys and values: only one chunk's
        activations are alive at a time. None: the whole window. For models that `longrope.apply`
        takes.
    """

    def __init__(self, model: nn.Module, chunk: int | None = None):
        self.model = called_model(model)
        self.chunk = chunk
        self.device = device_of(model)
        self.base, self.head = _base_and_head(self.model)

    def __call__(self, ids: torch.Tensor, scored: int, cache: Any = None) -> torch.Tensor:
        """Return the NLL of the last `scored` tokens of each row, float32 `[B, scored]`.

        `ids` is int64 `[B, N]`, `1 <= scored < N`. A `cache` with room for all tokens holds the
        first ones, and these do not go through the model; the token that predicts the first scored
        one is not among them.
        """
        ids = ids.to(self.device)
        parts = []
        for first, output in self._outputs(ids, scored, cache):
            targets = ids[:, first : first + output.shape[1]]
            parts.append(self.nll(output, targets.flatten()).view_as(targets))
        return torch.cat(parts, dim=1)

    def answers(self, ids: torch.Tensor, scored: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the NLL of the last tokens of each row, and whether each is the likeliest one.

        float32 and bool, `[B, scored]`. Greedy generation gives exactly these tokens where all of
        them are the likeliest: as long as it agrees with them, it has the same tokens before it.
        """
        ids = ids.to(self.device)
        losses, likeliest = [], []
        for first, output in self._outputs(ids, scored):
            targets = ids[:, first : first + output.shape[1]]
            losses.append(self.nll(output, targets.flatten()).view_as(targets))
            likeliest.append(self.logits(output).argmax(-1) == targets)
        return torch.cat(losses, dim=1), torch.cat(likeliest, dim=1)

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Return the logits of outputs of `forward`, `[B, n, V]`."""
        return output if self.base is None else self.head(output)

    def sums(
        self, ids: torch.Tensor, scored: int, blocks: int = 1, cache: Any = None
    ) -> torch.Tensor:
        """Return the sum of the NLL in each block of each row, float64 `[B, blocks]`.

        On the model's device, without waiting for it. The scored token `t` of `scored` belongs to
        block `t * blocks // scored`. `cache` is that of a call.
        """
        ids = ids.to(self.device)
        rows, length = ids.shape
        totals = torch.zeros(rows * blocks, dtype=torch.float64, device=self.device)
        first_row = blocks * torch.arange(rows, device=self.device)[:, None]
        for first, output in self._outputs(ids, scored, cache):
            end = first + output.shape[1]
            targets = ids[:, first:end].flatten()
            token = torch.arange(first, end, device=self.device) - (length - scored)
            block = (first_row + token * blocks // scored).flatten()
            totals += block_sums(self.nll(output, targets), targets, block, rows * blocks)
        return totals.view(rows, blocks)

    def backward(self, ids: torch.Tensor, scored: int, cache: Any = None) -> torch.Tensor:
        """Return the sum of the NLL of the last `scored` tokens, float64 `[]`, after its backward.

        Gradients are added to the leaves that ask for them. With `chunk`, all chunks but the last
        go through the model forwards, then each again from the last to the first with its backward
        pass: besides one chunk's activations only the cache and its gradients are alive, and the
        arithmetic is that of one more forward pass. Every chunk has a graph of its own, so the
        leaves are what the model is given, not what that was computed from.

        `ids` is int64 `[B, N]`, `1 <= scored < N`. `cache` is that of a call, differentiable.
        """
        ids = ids.to(self.device)
        length, begin = ids.shape[1], _held(cache)
        if self.chunk is None or self.chunk >= length - 1 - begin:
            nll = self(ids, scored, cache).double().sum()
            nll.backward()
            return nll.detach()
        cache = differentiable_cache(self.model, length - 1) if cache is None else cache
        first = length - scored - 1
        starts = range(begin, length - 1, self.chunk)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.planned(length):
            with torch.no_grad():
                for start in starts[:-1]:
                    self._chunk(ids, start, cache)
            for start in reversed(starts):
                rewind(cache, start)
                output = self._chunk(ids, start, cache)
                skipped = min(max(0, first - start), output.shape[1])
                targets = ids[:, start + skipped + 1 : start + output.shape[1] + 1]
                # Of no scored token, but later ones have read its keys and values.
                nll = output[:, :0].double().sum()
                if targets.numel():
                    nll = self.nll(output[:, skipped:], targets.flatten()).double().sum()
                nll.backward()
                total += nll.detach()
        return total

    def nll(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the NLL of `targets` `[T]` under outputs of `forward` `[B, n, ...]`, `B n = T`."""
        output = output.flatten(0, 1)
        if self.base is None:
            at = targets.to(output.device)
            nll = nn.functional.cross_entropy(output.float(), at, reduction="none")
        else:
            weight = self.head.weight  # of a model on several devices maybe on another one
            nll = ops.linear_nll(output.to(weight.device), weight, targets.to(weight.device))
        return nll.to(targets.device)

    def feed(self, ids: torch.Tensor, end: int, cache: Any) -> None:
        """Put the tokens of windows `[B, N]` up to `end`, behind those it holds, into a cache."""
        ids = ids.to(self.device)
        for start in range(_held(cache), end, self.chunk or ids.shape[1]):
            self._chunk(ids[:, : end + 1], start, cache)  # its last token is left out

    def _outputs(
        self, ids: torch.Tensor, scored: int, cache: Any = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first token that is predicted, and what predicts it and those after it.

        Each `[B, n, ...]`, as `forward` returns it.
        """
        length, begin = ids.shape[1], _held(cache)
        if cache is None and (self.chunk is None or self.chunk >= length):
            output = self.forward(ids, use_cache=False)
            yield length - scored, output[:, -scored - 1 : -1]
            return
        cache = window_cache(self.model, length - 1) if cache is None else cache
        first = length - scored - 1  # the token whose output predicts the first scored one
        with self.planned(length):
            # The last token predicts none.
            for start in range(begin, length - 1, self.chunk or length):
                output = self._chunk(ids, start, cache)
                skipped = max(0, first - start)
                if skipped < output.shape[1]:
                    yield start + skipped + 1, output[:, skipped:]

    def _chunk(self, ids: torch.Tensor, start: int, cache: Any) -> torch.Tensor:
        """Return the output of the chunk that begins at `start`; the last token predicts none."""
        end = min(start + (self.chunk or ids.shape[1]), ids.shape[1] - 1)
        return self.append(ids[:, start:end], start, cache)

    def append(self, ids: torch.Tensor, start: int, cache: Any) -> torch.Tensor:
        """Return the output of tokens `[B, n]` from position `start` on, through a cache."""
        return self.forward(
            ids,
            position_ids=torch.arange(start, start + ids.shape[1], device=self.device)[None],
            use_cache=True,
            **{cache_argument(decoder(self.model)): cache},
        )

    def forward(self, ids: torch.Tensor, **arguments) -> torch.Tensor:
        """Return hidden states, or logits where the head is not a matrix product alone."""
        if self.base is None:
            return self.model(input_ids=ids, **arguments).logits
        return self.base(input_ids=ids, **arguments).last_hidden_state

    def planned(self, length: int) -> contextlib.AbstractContextManager:
        """Choose tiers by the whole window, which its first chunks do not show."""
        if isinstance(decoder(self.model).rotary_emb, RescaledRotaryEmbedding):
            return row_lengths(self.model, length)
        return contextlib.nullcontext()


def _held(cache: Any) -> int:
    """Return how many tokens a cache holds; None holds none."""
    return 0 if cache is None else int(cache.get_seq_length())


def block_sums(
    nll: torch.Tensor, targets: torch.Tensor, block: torch.Tensor, blocks: int
) -> torch.Tensor:
    """Return the sum of the NLL `[T]` of each block of tokens, float64 `[blocks]`.

    Added in an order that is always the same, on a GPU too, where `index_add_` has none.
    """
    return ops.candidate_sums(nll, targets, block, blocks)[0]


def _base_and_head(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the model below the output layer and that layer, or `(None, None)`.

    Some models do more than one matrix product at the end (a bias, a soft cap, a scale). Whether
    the two parts give the model's own logits is tried on a few tokens, not guessed from its name.
    """
    try:
        base = decoder(model)  # also below a wrapper, whose base_model is something else
    except (AttributeError, TypeError, ValueError):
        base = getattr(model, "base_model", None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if base is None or base is model or not isinstance(head, nn.Linear):
        return None, None
    if is_sharded(model) or not is_plain(head.weight):
        return None, None  # the weights are there, and floats, inside the model's forward alone
    probe = torch.arange(4, device=device_of(model))[None]
    try:
        expected = model(input_ids=probe, use_cache=False).logits
        hidden = base(input_ids=probe, use_cache=False).last_hidden_state
        actual = nn.functional.linear(hidden.to(head.weight.device), head.weight)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError, RuntimeError):
        return None, None
    same = expected.shape == actual.shape and torch.allclose(
        expected.float(), actual.to(expected.device).float(), rtol=1e-3, atol=1e-3, equal_nan=True
    )
    return (base, head) if same else (None, None)
