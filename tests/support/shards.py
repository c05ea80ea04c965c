"""`longrope.extend` by ranks that train weights in shards (FSDP2), on CPUs."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from unittest import mock

from support import extension_runs, tiny_models
from support.tiny_search import SIZES, build_model

STAGES = extension_runs.STAGES[:2]


def tied():
    """Return the tiny model with one tensor for its first and last layer."""
    return tiny_models.build(**SIZES, tie_word_embeddings=True)


@contextlib.contextmanager
def allowed():
    """Let accelerate make shards on CPUs too, inside the block."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    from longrope.extension import sharding

    own = AcceleratorState.__init__

    def sharded(self, *args, fsdp_plugin=None, **kwargs):
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        # What it does where the ranks have GPUs.
        self.distributed_type = DistributedType.FSDP
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    with (
        mock.patch.object(AcceleratorState, "__init__", sharded),
        mock.patch.object(sharding, "DEVICES", ("cpu",)),
        mock.patch.dict(os.environ, {sharding.FSDP: "true"}),
    ):
        yield


def guarded(rank: int, size: int) -> str | None:
    """Return what stops a step in which the last rank's share of one gradient has a NaN."""
    import torch
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    from longrope.extension.trainer import GradientGuard, NotFiniteError

    mesh = init_device_mesh("cpu", (size,))
    model = torch.nn.Linear(3, 4)
    for name, parameter in list(model.named_parameters()):
        whole = distribute_tensor(torch.ones_like(parameter), mesh, [Shard(0)])
        setattr(model, name, torch.nn.Parameter(whole))
        getattr(model, name).grad = whole.clone()
    if rank == size - 1:
        model.bias.grad.to_local()[0] = float("nan")
    guard = GradientGuard(mock.Mock(not_finite=lambda what, value: f"{what} {value}"))
    try:
        guard.on_pre_optimizer_step(None, None, None, model=model)
    except NotFiniteError as error:
        return str(error)
    return None


def sharded(rank: int, size: int, folder: Path) -> dict:
    """Whole, stopped in a step and again, in bfloat16, with tied weights; and what is refused."""
    from longrope import report
    from longrope.extension import trainer
    from longrope.extension.folder import weights_hash

    report.at_end = lambda out: None  # seconds each
    own_step = trainer.RowTrainer.training_step
    held, stop = [], [None]

    def step(self, model, *args):
        if self.state.global_step == stop[0]:
            raise ValueError("stopped")
        locally = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
        held.append(sum(part.numel() for part in locally))
        return own_step(self, model, *args)

    trainer.RowTrainer.training_step = step

    def run(out, model=build_model, environment=(), **finetune):
        stages = [STAGES[0], STAGES[1] | finetune]
        try:
            with mock.patch.dict(os.environ, environment):
                result = extension_runs.run(
                    folder / out, model=model, stages=stages, target_length=32
                )
        except Exception as error:
            return str(error)
        return [weights_hash(result.model), result.measured.table()]

    with allowed():
        found = {"whole": run("whole"), "held": held[0], "guarded": guarded(rank, size)}
        stop[0] = 2
        found["stopped"] = run("cut")
    stop[0] = None
    found["resumed whole"] = run("cut")
    with allowed():
        found["resumed"] = run("cut")
        found["tied"] = run("tied", model=tied)
        found["bf16"] = run("bf16", precision="bf16", activation_checkpointing=True)
        found["adapters"] = run("none", lora_rank=2)
        found["files"] = run("none", environment={"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"})
        found["FSDP 1"] = run("none", environment={"FSDP_VERSION": "1"})
    found["DeepSpeed"] = run("none", environment={"ACCELERATE_USE_DEEPSPEED": "true"})
    return found
