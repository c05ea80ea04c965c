"""Measuring candidates on a model: many candidates and documents in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from longrope.evaluation.modes import evaluating
from longrope.evaluation.nll import NextTokenNLL
from longrope.factor_search.space import Candidate
from longrope.factor_search.windows import scored_tokens
from longrope.factors import RescaleFactors
from longrope.patching import rope_settings
from longrope.patching import rows as rows_with_factors
from longrope.patching.attention import kernel_attention
from longrope.patching.embedding import stacked
from longrope.patching.mlp import inplace_mlps


class PopulationEvaluator:
    """The mean NLL of candidates over fixed windows; the model is left as it was after each call.

    Each row of a batch is one candidate on one window: the rows carry their own frequencies, start
    tokens and temperature, so a population needs one forward pass where memory allows. The model
    runs in eval mode; after a call (even one that ends with an exception or an interrupt) its
    training flags and its rotary embedding are what they were.

    Parameters
    ----------
    model
        A causal language model that `longrope.apply` supports.
    to_factors
        Turns a candidate into `RescaleFactors`.
    rows
        Rows of one forward pass, at least 1.
    last_tokens
        Only the last tokens of each window are scored; None: all but the first.
    chunk
        Tokens of each row in one forward pass, with a cache of keys and values; None: the whole
        window at once. The results differ by rounding alone.
    """

    _attend: Callable[..., torch.Tensor] | None = None  # `ops.attention`

    def __init__(
        self,
        model: nn.Module,
        to_factors: Callable[[Candidate], RescaleFactors],
        rows: int,
        last_tokens: int | None = None,
        chunk: int | None = None,
    ):
        self.model = model
        self.last_tokens = last_tokens
        self.to_factors = to_factors
        self.rows = rows
        self.chunk = chunk
        with evaluating(model):
            self._score = NextTokenNLL(model, chunk)

    def candidates_per_batch(self, windows: torch.Tensor) -> int:
        """Return how many candidates are measured together, the unit that a journal commits."""
        return max(1, self.rows // len(windows))

    def __call__(self, candidates: Sequence[Candidate], windows: torch.Tensor) -> list[float]:
        """Return the mean NLL over the scored tokens of all windows, in nats, per candidate.

        `windows` is int64 `[S, N]`. Not finite where the model's output is not.
        """
        sums, counts = self.block_sums(candidates, windows, 1)
        return (sums.sum((1, 2)) / (len(windows) * counts.sum())).tolist()

    def block_sums(
        self, candidates: Sequence[Candidate], windows: torch.Tensor, blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the NLL in each block of the scored tokens, and the tokens in each.

        Parameters
        ----------
        candidates
            `C` of them, or factors as such.
        windows
            int64 `[S, N]`.
        blocks
            The number of runs of consecutive tokens, equal in length within one, into which the
            scored tokens of each window are cut: from 1 to the number of scored tokens.

        Returns
        -------
        sums
            float64 `[C, S, blocks]` on the CPU, in nats. The device is waited for once, at the end.
        counts
            int64 `[blocks]`, the same for every candidate and window.

        Raises
        ------
        ValueError
            Where `blocks` is out of range.
        """
        scored = scored_tokens(windows, self.last_tokens)
        counts = tokens_of_blocks(scored, blocks)
        device = self._score.device
        windows = windows.to(device)
        factors = [c if isinstance(c, RescaleFactors) else self.to_factors(c) for c in candidates]
        inv_freq, attention_factor = (torch.from_numpy(a).to(device) for a in stacked(factors))
        start_tokens = torch.tensor([f.start_tokens for f in factors], device=device)
        by_layer = inv_freq.ndim > 2
        # Row r is candidate r // S on window r % S.
        rows = torch.arange(len(factors) * len(windows), device=device)
        sums = []
        with evaluating(self.model), inplace_mlps(self.model), self._turning() as turn_by:
            for row in rows.split(self.rows):
                candidate, window = row // len(windows), row % len(windows)
                turned = inv_freq[candidate], attention_factor[candidate]
                if by_layer:
                    turned = [t.transpose(0, 1) for t in turned]
                turn_by(turned[0], start_tokens[candidate], turned[1])
                sums.append(self._sums(windows[window], scored, blocks))
        return torch.cat(sums).cpu().view(len(factors), len(windows), blocks), counts

    @contextlib.contextmanager
    def _turning(self) -> Iterator[Callable[..., None]]:
        """Yield what gives the rows of the passes to come their factors, inside a block."""
        plain = torch.ones(rope_settings(self.model).rotary_dim // 2, dtype=torch.float64)
        with (
            kernel_attention(self.model, self._attend),
            rows_with_factors(self.model, plain) as rotary,
        ):
            yield rotary.set_rows

    def _sums(self, ids: torch.Tensor, scored: int, blocks: int) -> torch.Tensor:
        """Return the NLL of windows `[B, N]`, whose factors are in force: float64 `[B, blocks]`."""
        return self._score.sums(ids, scored, blocks)


def tokens_of_blocks(scored: int, blocks: int) -> torch.Tensor:
    """Return how many of the scored tokens are in each block, int64 `[blocks]`.

    Raises `ValueError` where there are more blocks than tokens.
    """
    if not 1 <= blocks <= scored:
        raise ValueError(f"blocks: expected 1 to the {scored} scored tokens, got {blocks}")
    return torch.bincount(torch.arange(scored) * blocks // scored, minlength=blocks)
