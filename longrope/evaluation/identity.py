"""Hashes that tell models and token ids apart, for the headers of journals."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

#: Elements of each tensor that the fingerprint reads, evenly spread.
_FINGERPRINT_SAMPLES = 4096
#: Tokens that are hashed at a time: a document may be most of the memory.
_HASHED = 1 << 20


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


def digest(windows: torch.Tensor) -> str:
    """Return a hash of the tokens of windows or a document, for the header of a journal.

    The same for every type that holds them.
    """
    found = hashlib.sha256(repr(tuple(windows.shape)).encode())
    flat = windows.flatten()
    for start in range(0, len(flat), _HASHED):
        found.update(flat[start : start + _HASHED].to(torch.int64).numpy().tobytes())
    return found.hexdigest()[:16]
