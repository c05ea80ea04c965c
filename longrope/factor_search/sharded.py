"""Measuring candidates on windows too long for one device: every rank holds a part of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longrope.distributed.ranks import Ranks
from longrope.distributed.ring import RingAttention
from longrope.evaluation.modes import evaluating
from longrope.evaluation.nll import block_sums
from longrope.factor_search.evaluator import PopulationEvaluator, tokens_of_blocks
from longrope.factor_search.space import Candidate
from longrope.factor_search.windows import scored_tokens
from longrope.factors import RescaleFactors
from longrope.patching import rows as rows_with_factors
from longrope.patching.attention import has_kernel_attention, kernel_attention


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

    Raises
    ------
    ValueError
        Where the model's attention cannot be replaced, and for a model on a GPU in a job whose
        process group has no nccl.
    """

    def __init__(
        self,
        model: nn.Module,
        to_factors: Callable[[Candidate], RescaleFactors],
        rows: int,
        last_tokens: int | None,
        ranks: Ranks,
    ):
        if not has_kernel_attention(model):
            raise ValueError(
                "shard_sequence: expected a model whose attention ops.attention can compute "
                f"(longrope.patching.attention), got {type(model).__name__} in "
                f"{next(model.parameters()).dtype}"
            )
        device = next(model.parameters()).device
        if not ranks.can_pass_on(device):
            raise ValueError(
                f"shard_sequence: expected a process group with nccl for a model on {device.type}, "
                "got one without"
            )
        super().__init__(model, to_factors, rows, last_tokens)
        self.ranks = ranks

    def block_sums(
        self, candidates: Sequence[Candidate], windows: Tensor, blocks: int
    ) -> tuple[Tensor, Tensor]:
        """As `PopulationEvaluator.block_sums`, of whole windows; `N >= 2 * ranks.size`."""
        scored = scored_tokens(windows, self.last_tokens)
        counts = tokens_of_blocks(scored, blocks)
        factors = [self.to_factors(candidate) for candidate in candidates]
        rows = [(f, window) for f in factors for window in windows]
        sums = []
        with self.ranks.tied(), evaluating(self.model):
            for start in range(0, len(rows), self.rows):
                sums.append(self._sums(rows[start : start + self.rows], scored, blocks))
        everywhere = self.ranks.gather(torch.cat(sums).cpu())
        total = sum(everywhere[1:], start=everywhere[0])
        return total.view(len(factors), len(windows), blocks), counts

    def _sums(
        self, rows: Sequence[tuple[RescaleFactors, Tensor]], scored: int, blocks: int
    ) -> Tensor:
        """Return the NLL of the tokens that this rank predicts, by row and block, float64."""
        ids = torch.stack([window for _, window in rows])
        length = ids.shape[1]
        ring = RingAttention(self.ranks, length)
        positions = ring.positions
        # Position p predicts the token at p + 1.
        predicts = (positions >= length - 1 - scored) & (positions < length - 1)
        predicted = positions[predicts] + 1
        inv_freq = torch.stack([torch.from_numpy(f.inv_freq()) for f, _ in rows])
        starts = torch.tensor([f.start_tokens for f, _ in rows])
        attention_factors = torch.tensor([f.attention_factor for f, _ in rows]).double()
        with (
            rows_with_factors(self.model, inv_freq, starts, attention_factors),
            kernel_attention(self.model, ring),
        ):
            device = self._score.device
            output = self._score.forward(
                ids[:, positions].to(device),
                position_ids=positions.to(device)[None],
                use_cache=False,
            )
        if not predicts.any():
            return torch.zeros(len(rows), blocks, dtype=torch.float64, device=device)
        targets = ids[:, predicted].flatten().to(device)
        nll = self._score.nll(output[:, predicts.to(device)], targets)
        block = (predicted - (length - scored)) * blocks // scored
        block = (blocks * torch.arange(len(rows))[:, None] + block).flatten().to(device)
        return block_sums(nll, targets, block, len(rows) * blocks).view(len(rows), blocks)
