"""transformers' Trainer with our loss, our rows in order, and checkpoints that survive a kill.

Imported when a stage of fine-tuning runs: the Trainer needs `accelerate`.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback

from longrope.distributed import ranks
from longrope.errors import NotFiniteError
from longrope.evaluation.modes import evaluating
from longrope.evaluation.nll import NextTokenNLL
from longrope.extension import checkpoint
from longrope.extension.data import NO_TARGET, TrainingRows
from longrope.patching.saving import exporting

#: What accelerate leaves on a model that it has prepared, whose forward pass it would then take for
#: one that it has under autocast already.
_PREPARED = ("_is_accelerate_prepared", "_original_forward")


@contextlib.contextmanager
def giving_loss(model: nn.Module) -> Iterator[None]:
    """Inside the block the forward pass of a causal language model returns a loss.

    `model(input_ids=, targets=, position_ids=)` is the sum of the NLL of the targets, in nats:
    hidden states and `ops.linear_nll`, so that no logits exist, where the output layer is a matrix
    product alone. In the forward pass itself, because wrappers of a model (data parallelism, FSDP)
    have its weights at hand there and nowhere else.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with evaluating(inner):
        scorer = NextTokenNLL(inner)
    before = inner.__dict__.get("forward")
    inner.forward = functools.partial(_loss, scorer, inner.forward)
    try:
        yield
    finally:
        del inner.forward
        if before is not None:
            inner.forward = before
        for name in _PREPARED:
            model.__dict__.pop(name, None)


def _loss(
    scorer: NextTokenNLL, own: Callable, input_ids: torch.Tensor, targets: torch.Tensor,
    position_ids: torch.Tensor, **_: Any,
) -> torch.Tensor:  # fmt: skip
    if scorer.base is None:
        output = own(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    else:
        output = scorer.forward(input_ids, position_ids=position_ids, use_cache=False)
    return scorer.nll(output, targets.flatten()).sum()


class RowTrainer(Trainer):
    """A Trainer of `TrainingRows` on a model inside `giving_loss`.

    `name` is what messages call the stage, `keep` the number of complete checkpoints that stay.
    """

    def __init__(self, *args: Any, name: str, keep: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.name, self.keep = name, keep
        self.model_accepts_loss_kwargs = True  # the loss is divided here, by the tokens of a batch

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple:
        """Return the passes of a step, and how many tokens all devices predict in it."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum((batch["targets"] != NO_TARGET).sum() for batch in samples)
        count = torch.as_tensor(count, device=device)
        return samples, self.accelerator.gather(count).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return the part of a pass in the mean NLL of its step."""
        # Devices' gradients are averaged, hence the factor.
        return model(**inputs) * (self.accelerator.num_processes / num_items_in_batch)

    def training_step(self, model: nn.Module, inputs: dict, *args: Any) -> torch.Tensor:
        """Do a pass forwards and backwards; raise `NotFiniteError` before anything is updated."""
        with ranks.current().tied():  # the others wait for this rank's gradients
            loss = super().training_step(model, inputs, *args)
        losses = self.accelerator.gather(loss.detach().reshape(1))  # all ranks end together
        broken = losses[~torch.isfinite(losses)]
        if len(broken):
            raise NotFiniteError(self.not_finite("loss", float(broken[0])))
        return loss

    def not_finite(self, what: str, value: float) -> str:
        """Return the sentence of a step that failed."""
        step = self.state.global_step
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        size *= self.args.world_size
        dataset: TrainingRows = self.train_dataset
        first = step * size
        names = "; ".join(dataset.names(row) for row in range(first, first + min(size, 4)))
        last = checkpoint.last_complete(Path(self.args.output_dir), self.args.should_save)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint is there yet"
        return (
            f"finetune: expected a finite {what}, got {value} in step {step + 1} of stage "
            f"{self.name}, rows {first} to {first + size - 1} ({names}); {kept}"
        )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing: a checkpoint with the marker is whole, and lacks tied weights alone."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        path = folder / f"checkpoint-{self.state.global_step}"
        job = ranks.current()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._writing(path))
            stack.enter_context(exporting())  # the run has the factors
            if self.is_fsdp_enabled and self.args.should_save:
                stack.enter_context(job.tied())  # the others wait for the rank that writes
            stack.enter_context(warnings.catch_warnings())
            # Said where transformers looks for tied weights among those in shards.
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            super()._save_checkpoint(model, trial)
        job.gather(None)  # an error of one rank ends all of them, here and behind the marker
        if self.args.should_save:
            with self._writing(path):
                checkpoint.mark(path)
        job.gather(None)
        if self.args.should_save:
            checkpoint.forget(folder, self.keep)

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Remove a checkpoint that cannot be written, and say what that means."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:  # of torch.save, a RuntimeError
            if self.args.should_save:
                shutil.rmtree(path, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            last = checkpoint.last_complete(path.parent, self.args.should_save)
            goes_on = f"from {last.name}" if last else "from the start of the stage"
            raise OSError(
                f"out: cannot write {path} ({reason}); the same call goes on {goes_on}"
            ) from None


class GradientGuard(TrainerCallback):
    """Stops before a step whose gradients are not finite."""

    def __init__(self, trainer: RowTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients after clipping, which spreads what is not finite."""
        gradients = (p.grad for p in kwargs["model"].parameters() if p.grad is not None)
        # Read once: a GPU that is asked about each gradient stands still as often. By torch, which
        # adds up what the ranks hold of gradients in shards, so that all of them stop.
        if not torch.isfinite(sum(gradient.sum() for gradient in gradients)):
            raise NotFiniteError(self.trainer.not_finite("gradient", float("nan")))


class Progress(TrainerCallback):
    """Tells a function of steps, tokens and the loss."""

    def __init__(self, update: Callable[[int, int, str | None], None], tokens_per_step: int):
        self.update, self.tokens = update, tokens_per_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        self.update(1, self.tokens, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest loss."""
        if logs and "loss" in logs:
            self.update(0, 0, f"{logs['loss']:.4f}")
