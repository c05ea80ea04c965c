"""Measures candidates on windows that are too long for one device: every rank holds a share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longrope import ops
from longrope.evaluation import NextTokenNLL, evaluating
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.objective import scored_tokens
from longrope.factor_search.ranks import Ranks
from longrope.factor_search.ring import RingAttention
from longrope.factor_search.space import Candidate
from longrope.factors import RescaleFactors
from longrope.patching import rows as rows_with_factors
from longrope.patching.attention import kernel_attention


class ShardedEvaluator(PopulationEvaluator):
    """As `PopulationEvaluator`, for all ranks of a job together; each returns the same values.

    Each rank runs the model on its tokens of every window, with their positions in the window, and
    `RingAttention` in the attention layers. Activations, keys and values are those of
    `N / ranks.size` tokens. The sums of NLL are added in float64, in the order of the ranks.

    Parameters
    ----------
    model, to_factors, rows, last_tokens
        As for `PopulationEvaluator`.
    ranks
        The ranks of the job.
    """

    def __init__(
        self,
        model: nn.Module,
        to_factors: Callable[[Candidate], RescaleFactors],
        rows: int,
        last_tokens: int | None,
        ranks: Ranks,
    ):
        super().__init__(model, to_factors, rows, last_tokens)
        self.ranks = ranks
        with evaluating(model):
            self._parts = NextTokenNLL(model)

    def __call__(self, candidates: Sequence[Candidate], windows: Tensor) -> list[float]:
        """Return the mean NLL over the scored tokens of all windows, in nats, per candidate.

        `windows` is int64 `[S, N]`, the whole windows, `N >= 2 * ranks.size`. Not finite where the
        model's output is not.

        Raises `ValueError` where the model's attention layers do not run `RingAttention`.
        """
        factors = [self.to_factors(candidate) for candidate in candidates]
        pairs = [(f, window) for f in factors for window in windows]
        scored = scored_tokens(windows, self.last_tokens)
        sums = []
        with self.ranks.tied(), evaluating(self.model):
            for start in range(0, len(pairs), self.rows):
                sums += self._sums(pairs[start : start + self.rows], scored)
        totals = [sum(parts) for parts in zip(*self.ranks.gather(sums), strict=True)]
        count = len(windows)
        return [
            sum(totals[start : start + count]) / (count * scored)
            for start in range(0, len(totals), count)
        ]

    def _sums(self, pairs: Sequence[tuple[RescaleFactors, Tensor]], scored: int) -> list[float]:
        """Return the NLL of each row, summed over the scored tokens that this rank predicts."""
        ids = torch.stack([window for _, window in pairs])
        length = ids.shape[1]
        ring = RingAttention(self.ranks, length)
        positions = ring.positions
        # Position p predicts the token at p + 1.
        predicts = (positions >= length - 1 - scored) & (positions < length - 1)
        targets = ids[:, positions[predicts] + 1]
        inv_freq = torch.stack([torch.from_numpy(f.inv_freq()) for f, _ in pairs])
        starts = torch.tensor([f.start_tokens for f, _ in pairs])
        attention_factors = torch.tensor([f.attention_factor for f, _ in pairs]).double()
        with (
            rows_with_factors(self.model, inv_freq, starts, attention_factors),
            kernel_attention(self.model, ring),
        ):
            nll = self._nll(ids[:, positions], positions, predicts, targets)
        if not ring.calls:
            raise ValueError(
                "shard_sequence: expected a model whose attention layers use transformers' "
                f"AttentionInterface, got {type(self.model).__name__}"
            )
        return nll.double().sum(1).tolist()

    def _nll(self, ids: Tensor, positions: Tensor, predicts: Tensor, targets: Tensor) -> Tensor:
        base, head, device = self._parts.base, self._parts.head, self._parts.device
        call = {
            "input_ids": ids.to(device),
            "position_ids": positions.to(device)[None],
            "use_cache": False,
        }
        targets, rows = targets.to(device), predicts.to(device)
        if base is None:
            hidden = self.model(**call).logits[:, rows]
        else:
            hidden = base(**call).last_hidden_state[:, rows]
        hidden = hidden.flatten(0, 1)
        if not targets.numel():
            return targets.float()  # none of this rank's tokens is scored
        if base is None:
            nll = nn.functional.cross_entropy(hidden.float(), targets.flatten(), reduction="none")
        else:
            nll = ops.linear_nll(hidden, head.weight, targets.flatten())
        return nll.view_as(targets)
