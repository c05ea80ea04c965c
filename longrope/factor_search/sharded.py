"""Measuring candidates on windows too long for one device: every rank holds a part of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longrope.distributed.ranks import Ranks
from longrope.distributed.ring import RingAttention
from longrope.evaluation.nll import block_sums
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.space import Candidate
from longrope.factors import RescaleFactors
from longrope.patching.attention import has_kernel_attention
from longrope.patching.wrappers import device_of, dtype_of


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
                f"{dtype_of(model)}"
            )
        device = device_of(model)
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
        self._attend = RingAttention(self.ranks, windows.shape[1])
        with self.ranks.tied():
            sums, counts = super().block_sums(candidates, windows, blocks)
        everywhere = self.ranks.gather(sums)
        return sum(everywhere[1:], start=everywhere[0]), counts

    def _sums(self, ids: Tensor, scored: int, blocks: int) -> Tensor:
        """Return the NLL of the tokens that this rank predicts, by row and block, float64."""
        rows, length = ids.shape
        positions = self._attend.positions.to(ids.device)
        # Position p predicts the token at p + 1.
        predicts = (positions >= length - 1 - scored) & (positions < length - 1)
        predicted = positions[predicts] + 1
        output = self._score.forward(
            ids[:, positions], position_ids=positions[None], use_cache=False
        )
        if not predicts.any():
            return torch.zeros(rows, blocks, dtype=torch.float64, device=ids.device)
        targets = ids[:, predicted].flatten()
        nll = self._score.nll(output[:, predicts], targets)
        block = (predicted - (length - scored)) * blocks // scored
        block = (blocks * torch.arange(rows, device=ids.device)[:, None] + block).flatten()
        return block_sums(nll, targets, block, rows * blocks).view(rows, blocks)
