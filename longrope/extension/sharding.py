"""Weights in shards while they are trained: torch's FSDP2, by accelerate's own configuration.

Between the ranks of a job lie the weights, their gradients and the optimizer's moments; the layers
of the model gather their own when they compute. Before and after training every rank holds a whole
model, as a search and the hash of the weights need it.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longrope.extension.config import FinetuneConfig
from longrope.patching.wrappers import device_of

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
#: Where accelerate shards weights; on CPUs it takes the configuration and trains whole ones.
DEVICES = ("cuda",)
#: What a checkpoint of weights in shards has.
WEIGHTS = "pytorch_model_fsdp.bin"
#: What accelerate is told where nothing is said, and the only value that can be: whole tensors in
#: checkpoints, since those of shards are read by pickle, and all weights on every rank before.
_FIXED = {
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}
#: What it is told where nothing is said: each decoder layer is gathered by itself.
_DEFAULTS = _FIXED | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")


def shards(processes: int) -> bool:
    """Say whether a job of so many ranks trains weights in shards."""
    return processes > 1 and _is_set(FSDP)


def check(model: nn.Module, config: FinetuneConfig) -> None:
    """Refuse a configuration of shards by which this model cannot be trained; `ValueError`."""
    if _is_set(DEEPSPEED):
        raise ValueError(
            "finetune: expected whole weights on every rank, or those of FSDP, got "
            f"{DEEPSPEED}={os.environ[DEEPSPEED]}"
        )
    if not _is_set(FSDP):
        return
    device = device_of(model).type
    if device not in DEVICES:
        raise ValueError(
            f"finetune: expected whole weights on every rank of a {device}, where accelerate makes "
            f"no shards, got {FSDP}={os.environ[FSDP]}"
        )
    if config.lora_rank:
        raise ValueError(
            f"lora_rank: expected 0 with {FSDP}, since adapters are merged into whole weights, got "
            f"{config.lora_rank}"
        )
    for name, value in _FIXED.items():
        given = os.environ.get(name, value)
        if given.lower() not in (value.lower(), *(("0", "no") if value == "false" else ())):
            raise ValueError(f"finetune: expected {name}={value}, got {given}")


def check_checkpoint(path: Path | None, in_shards: bool) -> None:
    """Refuse to go on from a checkpoint that was written the other way; `ValueError`."""
    was = path is not None and (path / WEIGHTS).is_file()
    if path is not None and was != in_shards:
        words = {True: "in shards", False: "whole"}
        raise ValueError(
            f"out: expected the job to hold weights as when it wrote {path}, {words[was]}, got "
            f"{words[in_shards]} ({FSDP} and the number of ranks decide)"
        )


@contextlib.contextmanager
def configured(active: bool) -> Iterator[None]:
    """Tell accelerate inside the block what the environment leaves out of the configuration."""
    added = [name for name in _DEFAULTS if active and name not in os.environ]
    os.environ.update({name: _DEFAULTS[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def set_precision(accelerator: Any, bf16: bool) -> None:
    """Tell a Trainer's FSDP what to compute in, before it makes the shards.

    Weights are gathered as bfloat16, gradients summed as they are kept, in float32; accelerate
    would sum them in bfloat16, and round the loss to it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # angles are not to be rounded
    )


def without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters hold nothing yet, the tied ones still tied."""
    empty = {
        id(parameter): nn.Parameter(parameter.data.new_empty(0), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


def fill(model: nn.Module, sharded: nn.Module) -> None:
    """Give a model `without_weights` those of one in shards; all ranks call it together."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    for name, parameter in model.named_parameters():
        parameter.data = whole[name]
