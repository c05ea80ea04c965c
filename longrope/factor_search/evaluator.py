"""Measures candidates on a model: many candidates and documents in one forward pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from longrope.evaluation import NextTokenNLL, evaluating
from longrope.factor_search.objective import scored_tokens
from longrope.factor_search.space import Candidate
from longrope.factors import RescaleFactors
from longrope.patching import rows as rows_with_factors

#: Elements of each tensor that the fingerprint reads, evenly spread.
_FINGERPRINT_SAMPLES = 4096


class PopulationEvaluator:
    """The mean NLL of candidates over fixed windows; the model is left as it was after each call.

    Each row of a batch is one candidate on one window: the rows carry their own frequencies, start
    tokens and temperature, so a population needs one forward pass where memory allows. The model
    runs in eval mode; after a call (also one that an exception or an interrupt ends) its training
    flags and its rotary embedding are what they were.

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
    """

    def __init__(
        self,
        model: nn.Module,
        to_factors: Callable[[Candidate], RescaleFactors],
        rows: int,
        last_tokens: int | None = None,
    ):
        self.model = model
        self.last_tokens = last_tokens
        self.to_factors = to_factors
        self.rows = rows
        with evaluating(model):
            self._score = NextTokenNLL(model)

    def candidates_per_batch(self, windows: torch.Tensor) -> int:
        """Return how many candidates are measured together, the unit that a journal commits."""
        return max(1, self.rows // len(windows))

    def __call__(self, candidates: Sequence[Candidate], windows: torch.Tensor) -> list[float]:
        """Return the mean NLL over the scored tokens of all windows, in nats, per candidate.

        `windows` is int64 `[S, N]`. Not finite where the model's output is not.
        """
        sums = [nll.double().sum(1) for nll in self._nll(candidates, windows)]
        per_row = torch.cat(sums).cpu().view(len(candidates), len(windows))
        scored = scored_tokens(windows, self.last_tokens)
        return (per_row.sum(1) / (len(windows) * scored)).tolist()

    def block_sums(
        self, candidates: Sequence[Candidate], windows: torch.Tensor, blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sums of the NLL in nats over `blocks` runs of scored tokens, and their sizes.

        float64 `[C, S, blocks]` on the CPU for `C` candidates and windows `[S, N]`, and int64
        `[blocks]`: tokens of each block, which differ by at most one.
        """
        scored = scored_tokens(windows, self.last_tokens)
        counts = torch.tensor([len(part) for part in torch.arange(scored).tensor_split(blocks)])
        sums = [
            torch.stack([part.double().sum(1) for part in nll.tensor_split(blocks, dim=1)], dim=1)
            for nll in self._nll(candidates, windows)
        ]
        return torch.cat(sums).cpu().view(len(candidates), len(windows), blocks), counts

    def _nll(
        self, candidates: Sequence[Candidate], windows: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Yield the NLL of each scored token, float32 `[rows, scored]`, a forward pass at a time.

        Row r of all is candidate r // S on window r % S.
        """
        factors = [self.to_factors(candidate) for candidate in candidates]
        inv_freq = torch.from_numpy(np.stack([f.inv_freq() for f in factors]))
        start_tokens = torch.tensor([f.start_tokens for f in factors])
        attention_factor = torch.tensor([f.attention_factor for f in factors], dtype=torch.float64)
        of_candidate = torch.arange(len(factors)).repeat_interleave(len(windows))
        of_window = torch.arange(len(windows)).repeat(len(factors))
        scored = scored_tokens(windows, self.last_tokens)
        for which, window in zip(
            of_candidate.split(self.rows), of_window.split(self.rows), strict=True
        ):
            with (
                evaluating(self.model),
                rows_with_factors(
                    self.model, inv_freq[which], start_tokens[which], attention_factor[which]
                ),
            ):
                nll = self._score(windows[window], scored)
            yield nll


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the model's config and of a spread sample of every parameter and buffer."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    settings.pop("_name_or_path", None)  # the same model may lie elsewhere today
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        spread = torch.linspace(
            0, max(flat.numel() - 1, 0), min(flat.numel(), _FINGERPRINT_SAMPLES),
            dtype=torch.float64,
        )  # fmt: skip
        sample = flat[spread.long().to(flat.device)].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
