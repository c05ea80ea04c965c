"""One stage of fine-tuning: rows of text, transformers' Trainer, and where it left off."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longrope._warnings import warn
from longrope.distributed import ranks
from longrope.evaluation.memory import free_memory, kept_per_token
from longrope.evaluation.modes import vocabulary
from longrope.evaluation.start import bos_token, without_bos
from longrope.extension import checkpoint, sharding
from longrope.extension.config import FinetuneConfig
from longrope.extension.data import TrainingRows, check_enough, eos_token
from longrope.extension.plan import FinetuneStage
from longrope.factors import Tiers
from longrope.patching import apply, remove, rope_settings
from longrope.patching.settings import text_config
from longrope.patching.wrappers import device_of, dtype_of
from longrope.report.extension import LOSSES
from longrope.runs.folder import write_table, write_text
from longrope.runs.progress import bar

#: How it goes through the model, which a resumed stage has to adopt.
NOTES = "notes.json"
#: What transformers seeds, numpy's older generator among it, takes numbers below this.
_SEEDS = 2**32


def check_trainable(model: nn.Module, config: FinetuneConfig, processes: int = 1) -> None:
    """Refuse a model whose weights cannot be trained, before anything is written.

    `processes` is the number of ranks, which share the rows of a step.

    Raises `ValueError`, or `ImportError` where a package is missing.
    """
    needed = {"accelerate": True, "peft": config.lora_rank > 0}
    for package in (name for name, wanted in needed.items() if wanted):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"finetune: needs the package {package} (pip install {package})")
    if int(os.environ.get("PARALLELISM_CONFIG_CP_SIZE", "1")) > 1:
        raise ValueError(
            "finetune: expected no context parallelism of accelerate, which splits SDPA alone and "
            "not the attention of tiers, got PARALLELISM_CONFIG_CP_SIZE="
            f"{os.environ['PARALLELISM_CONFIG_CP_SIZE']}"
        )
    sharding.check(model, config)
    if config.batch_size % (config.rows_per_pass * processes):
        raise ValueError(
            f"batch_size: expected a multiple of rows_per_pass ({config.rows_per_pass}) times the "
            f"number of ranks ({processes}), got {config.batch_size}"
        )
    dropped = getattr(text_config(model), "attention_dropout", 0)
    if config.tiers == "position" and dropped:
        raise ValueError(
            "model: expected no dropout in attention with tiers='position' (load it with "
            f"attention_dropout=0.0), got {dropped}"
        )
    if config.lora_rank:
        return
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "model: expected weights that can be trained, got a quantised model (lora_rank trains "
            "adapters beside it)"
        )
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError("model: expected weights of a floating-point type, got integers")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "model: expected parameters that were made outside torch.inference_mode(), got "
            "inference tensors, which take no part in gradients"
        )


def rows_of(
    model: nn.Module,
    documents: Sequence[torch.Tensor],
    stage: FinetuneStage,
    bos: int | None,
    first: int = 0,
) -> TrainingRows:
    """Return the rows of text of a stage from number `first` on.

    Raises `ValueError` where there is too little text.
    """
    config = stage.config
    texts = without_bos(documents, bos)
    before = int(bos is not None)
    check_enough(texts, stage.length - before, config.packed, stage.name)
    short = min(config.short_length or rope_settings(model).loaded_length, stage.length)
    if config.short_share:
        check_enough(texts, short - before, False, stage.name)
    return TrainingRows(
        texts,
        stage.length,
        config.steps * config.batch_size,
        config.seed,
        packed=config.packed,
        short_share=config.short_share,
        short_length=short,
        bos=bos,
        eos=eos_token(config.eos, model, vocabulary(model)),
        first=first,
    )


def finetune(
    model: nn.Module,
    documents: Sequence[Any],
    tiers: Tiers,
    stage: FinetuneStage,
    out: Path,
    progress: bool = True,
    first: int = 0,
) -> nn.Module:
    """Train a model's weights under factors, in place; a killed stage goes on where it was.

    Parameters
    ----------
    model
        A causal language model that `longrope.apply` supports.
    documents
        1-D token ids.
    tiers
        What `stage.config.tiers` chooses from.
    stage
        What to do.
    out
        Where checkpoints lie, and `losses.csv` in the end.
    progress
        Whether to show a progress bar.
    first
        How many rows earlier stages have taken: this one goes on behind them.

    Returns
    -------
    nn.Module
        The model, in eval mode and its own dtype, the factors taken out. Trained in shards
        (`sharding`) it is a copy, and the given one of no more use.

    Raises
    ------
    ValueError, OSError
        In one sentence: too little text, a loss that is not finite, a disk that is full.
    """
    config = stage.config
    rows = rows_of(model, documents, stage, bos_token(config.bos, model, documents), first)
    dtypes = [parameter.dtype for parameter in model.parameters()]
    trained = _trainable(model, config)
    in_shards = sharding.shards(ranks.current().size)
    whole = sharding.without_weights(model) if in_shards else model
    with _factors(model, tiers, config.tiers), _own_precision(), sharding.configured(in_shards):
        _train(trained, model, rows, stage, out, progress)
        if in_shards:
            sharding.fill(whole, model)
    model = whole
    if config.lora_rank:
        trained.merge_and_unload()
        if hasattr(model, "peft_config"):  # or the next adapters would be a second set
            del model.peft_config
    for parameter, dtype in zip(model.parameters(), dtypes, strict=True):
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(dtype.is_floating_point)  # quantised ones beside adapters are not
    return model.eval()


def _trainable(model: nn.Module, config: FinetuneConfig) -> nn.Module:
    """Return what is trained: the model in float32, or adapters around it."""
    if not config.lora_rank:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float32)
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed % _SEEDS)
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
    )
    with warnings.catch_warnings():  # it asks for a property by the name that transformers had
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, adapters)


@contextlib.contextmanager
def _own_precision() -> Iterator[None]:
    """Let the configuration alone decide about autocast, inside the block.

    transformers 4 hands it to accelerate in a variable of the environment, from where the next
    stage would take it.
    """
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def trained_under(model: nn.Module, tiers: Tiers, how: str) -> Tiers:
    """Return the tiers that weights are trained under, and expect by position afterwards."""
    loaded = rope_settings(model).loaded
    if how == "one":
        return tiers[-1:]
    if how == "row":
        return Tiers([loaded, tiers[-1]])
    return tiers if len(tiers) > 1 else tiers[0].ladder(loaded=loaded)


@contextlib.contextmanager
def _factors(model: nn.Module, tiers: Tiers, how: str) -> Iterator[None]:
    """Turn rows of training text as `FinetuneConfig.tiers` says, inside the block."""
    apply(model, trained_under(model, tiers, how), tiers="row" if how == "row" else "position")
    try:
        yield
    finally:
        remove(model)


def _train(
    trained: nn.Module, model: nn.Module, rows: TrainingRows, stage: FinetuneStage, out: Path,
    progress: bool,
) -> None:  # fmt: skip
    from transformers import TrainingArguments

    from longrope.extension.trainer import GradientGuard, Progress, RowTrainer, giving_loss

    config = stage.config
    job = ranks.current()
    out.mkdir(parents=True, exist_ok=True)
    last = job.by_first(lambda: checkpoint.last_complete(out))
    sharding.check_checkpoint(last, sharding.shards(job.size))
    cpu = device_of(model).type == "cpu"
    recomputed = job.by_first(lambda: _recomputes(model, stage, out))
    _checkpoint_activations(model, recomputed)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and not cpu)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=config.rows_per_pass,
        gradient_accumulation_steps=config.batch_size // (config.rows_per_pass * job.size),
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.decay, config.decay),
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=bf16,
        use_cpu=cpu,
        save_strategy="steps",
        save_steps=config.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        seed=config.seed % _SEEDS,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process a device: no nn.DataParallel over many
    with giving_loss(trained), contextlib.ExitStack() as stack:
        trainer = RowTrainer(
            trained, arguments, train_dataset=rows, name=stage.name, keep=config.keep
        )
        if sharding.shards(job.size):
            sharding.set_precision(trainer.accelerator, bf16)
        _quiet(trainer)
        trainer.add_callback(GradientGuard(trainer))
        if progress and job.first:
            update = stack.enter_context(bar(config.steps, "loss"))
            update(checkpoint.step_of(last) if last else 0, 0, None)
            trainer.add_callback(Progress(update, config.batch_size * stage.length))
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            _checkpoint_activations(model, False)
    if job.first:
        _write_losses(out / LOSSES, trainer.state.log_history)


def trained_bytes(weights: int) -> int:
    """Return what a rank holds of so many bytes of weights, their gradients and two moments."""
    size = ranks.current().size
    return 4 * weights // (size if sharding.shards(size) else 1)


def recomputes(model: nn.Module, stage: FinetuneStage, to_come: int) -> bool:
    """Say whether a stage computes activations again: as asked, or by the memory that is free.

    `to_come` are the bytes that training will take beside activations, which count as float32 in
    every precision: 0.7 (adapters on bfloat16, autocast) to 1.3 (float32, tiers by position) times
    that was kept. Warns where a pass would not fit either way: an estimate refuses no run.
    """
    config, length = stage.config, stage.length
    if config.activation_checkpointing is not None:
        return config.activation_checkpointing
    free = free_memory(device_of(model))
    if free is None:
        return False
    tokens = config.rows_per_pass * length
    recompute = tokens * kept_per_token(model, torch.float32) > (free - to_come) / 2
    if recompute:
        dtype = dtype_of(model) if config.lora_rank else torch.float32
        needed = to_come + tokens * kept_per_token(model, dtype, recompute=True)
        if needed > free and ranks.current().first:
            warn(
                f"stage {stage.name}: the activations of {config.rows_per_pass} rows of {length} "
                f"tokens, and the gradients and moments of weights, need about {needed} bytes "
                f"where {free} are free"
            )
    return recompute


def _recomputes(model: nn.Module, stage: FinetuneStage, out: Path) -> bool:
    """Return what `recomputes` said when the stage began: free memory must not change its bits."""
    path = out / NOTES
    if not path.is_file():
        held = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        to_come = trained_bytes(held) - held
        notes = {"activation_checkpointing": recomputes(model, stage, to_come)}
        write_text(path, json.dumps(notes) + "\n")
    return bool(json.loads(path.read_text(encoding="utf-8"))["activation_checkpointing"])


def _checkpoint_activations(model: nn.Module, active: bool) -> None:
    """Turn activation checkpoints on or off, by the name that each transformers has for it."""
    newer = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if newer else "gradient_checkpointing"
    if active:
        arguments = {f"{name}_kwargs": {"use_reentrant": False}}
        getattr(model, f"{name}_enable")(**arguments)
    elif getattr(model, f"is_{name}"):
        getattr(model, f"{name}_disable")()


def _quiet(trainer: Any) -> None:
    """Take out the callback that prints every log as a dict."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _write_losses(path: Path, history: Sequence[dict[str, Any]]) -> None:
    names = ("step", "loss", "grad_norm", "learning_rate")
    write_table(
        path, names, ([entry.get(n) for n in names] for entry in history if "loss" in entry)
    )
