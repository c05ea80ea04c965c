"""What a plan costs, before it runs: memory and time of each stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from longrope.evaluation.memory import (
    BackwardPlan,
    backward_bytes,
    forward_bytes,
    free_memory,
    kept_per_token,
    plan_backward,
    plan_batches,
)
from longrope.evaluation.modes import evaluating, vocabulary
from longrope.extension.beside import RULES
from longrope.extension.checks import searches
from longrope.extension.config import FinetuneConfig
from longrope.extension.finetune import recomputes, trained_bytes
from longrope.extension.plan import FinetuneStage, Plan, RecoverStage, SearchStage, Stage
from longrope.factor_search.checks import Asked
from longrope.factor_search.heads import most_evaluations as most_by_head
from longrope.factor_search.methods import most_evaluations
from longrope.patching import rope_settings
from longrope.patching.settings import text_config
from longrope.patching.wrappers import device_of

#: The cost of a backward pass in forward passes; activations that are computed again add one.
_BACKWARD = 2


@dataclass(frozen=True)
class Cost:
    """What a stage takes at most.

    Attributes
    ----------
    stage
        Its name and kind, in words; or the table.
    tokens
        Tokens that go through the model, a backward pass counted twice.
    memory
        Bytes at the widest point, beside the model as it is loaded.
    seconds
        At the speed that was measured.
    """

    stage: str
    tokens: float
    memory: int
    seconds: float


def estimate(
    model: nn.Module, plan: Plan, documents: Sequence[torch.Tensor], windows: int
) -> list[Cost]:
    """Return the cost of every stage, and last that of the table on so many windows.

    From one timed forward pass of the model's own window. Attention grows with the square of the
    length; everything else with the length.

    Raises `ValueError` where a stage would not fit the memory that is free.
    """
    speed = _flops_per_second(model, plan.window)
    about = {stage.name: found for stage, found in searches(model, plan, documents)}
    costs = []
    copy = 0  # of the weights, which the first training makes and later stages keep

    def add(name: str, length: int, passes: float, memory: int) -> None:
        seconds = passes * _forward_flops(model, length) / speed
        costs.append(Cost(name, passes * length, memory, seconds))

    for stage in plan.stages:
        length, passes, memory = _of_stage(model, stage, about.get(stage.name))
        if isinstance(stage, FinetuneStage):
            copy = _weights(model)
        else:
            memory += copy
        add(f"{stage.name} ({stage.kind})", length, passes, memory)
    target = plan.target_length
    rows = 1 + len(plan.stages) + len(RULES)  # as it was, after each stage, and the rules
    measured = forward_bytes(model, target, plan_batches(model, target, windows))
    add("the table", target, rows * windows, copy + measured)
    return costs


def table(model: nn.Module, plan: Plan, costs: Sequence[Cost]) -> str:
    """Return the plan with its costs as a table."""
    rows = [("stage", "does", "tokens", "memory", "time at most")]
    does = [*map(_does, plan.stages), "perplexity by range, before and after each stage"]
    for what, cost in zip(does, costs, strict=True):
        rows.append(
            (cost.stage, what, f"{cost.tokens:,.0f}", _gigabytes(cost.memory),
             _duration(cost.seconds))
        )  # fmt: skip
    seconds = sum(cost.seconds for cost in costs)
    widest = max(cost.memory for cost in costs)
    rows.append(("all", "", "", _gigabytes(widest), _duration(seconds)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    free = free_memory(device_of(model))
    known = "" if free is None else f"{_gigabytes(free)} of memory are free. "
    lines.append(
        known + "Memory beside that of the process, speed by one forward pass here; tokens go "
        "forwards, and backwards count as two."
    )
    return "\n".join(line.rstrip() for line in lines)


def _weights(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _of_stage(model: nn.Module, stage: Stage, about: Asked | None) -> tuple[int, float, int]:
    """Return the tokens of a row, the forward passes of one, and the bytes at the widest point.

    Those of training have its copy of the weights among them. `about` is what a search is about.
    """
    if isinstance(stage, FinetuneStage):
        config = stage.config
        rows = config.steps * config.batch_size
        to_come = _trained(model, config)
        recompute = recomputes(model, stage, to_come)
        kept = kept_per_token(model, torch.float32, recompute)
        memory = to_come + config.rows_per_pass * stage.length * kept
        return stage.length, rows * (1 + _BACKWARD + recompute), memory
    if isinstance(stage, RecoverStage):
        length = stage.lengths[-1]
        steps = stage.options.steps
        # By the length of a row, then by position.
        passes = 2 * len(stage.lengths) * (3 * steps + 5 * (7 + 5 + 8))
        return length, passes, _searching(model, length, None, plan_backward(model, length))
    # A ladder costs at most one search at its target; `per` has a descent of its own.
    options = about.options
    most = most_evaluations(about.problem, options, True) + most_by_head(options, True)
    steps = options.descent.steps * (1 + (options.per != "model")) if options.has_steps else 0
    passes = (most - steps) * options.windows
    backward = None
    if options.has_steps:
        backward = plan_backward(model, stage.length, options.activation_checkpointing)
    memory = _searching(model, stage.length, options.batch_size, backward)
    return stage.length, passes + 3 * steps * options.descent.windows_per_step, memory


def _trained(model: nn.Module, config: FinetuneConfig) -> int:
    """Return the bytes that training takes beside activations and the model as it is loaded."""
    if not config.lora_rank:
        return trained_bytes(4 * sum(p.numel() for p in model.parameters()))
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    adapters = config.lora_rank * sum(m.in_features + m.out_features for m in layers)
    return _weights(model) + trained_bytes(4 * adapters)


def _searching(
    model: nn.Module, length: int, rows: int | None, backward: BackwardPlan | None
) -> int:
    """Return the bytes that measuring factors takes, and their gradient if there is a plan."""
    memory = forward_bytes(model, length, plan_batches(model, length, rows=rows))
    return max(memory, backward_bytes(model, length, backward)) if backward else memory


def _forward_flops(model: nn.Module, length: int) -> float:
    """Return the floating-point operations of one forward pass of a row."""
    config = text_config(model)
    embedding = vocabulary(model) * config.hidden_size
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    tied = getattr(config, "tie_word_embeddings", False)
    products = 2 * (matrices if tied else matrices - embedding) * length
    heads = config.num_attention_heads * rope_settings(model).head_dim
    return products + 2 * config.num_hidden_layers * heads * float(length) ** 2


def _flops_per_second(model: nn.Module, window: int) -> float:
    length = min(window, 512)
    ids = torch.zeros(1, length, dtype=torch.int64, device=device_of(model))
    with evaluating(model):
        best = float("inf")
        for _ in range(2):
            began = time.perf_counter()
            model(input_ids=ids, use_cache=False).logits.sum().item()
            best = min(best, time.perf_counter() - began)
    return _forward_flops(model, length) / best


def _does(stage: Stage) -> str:
    if isinstance(stage, SearchStage):
        return f"factors for {stage.length} tokens, by {stage.tiers}"
    if isinstance(stage, FinetuneStage):
        config = stage.config
        return (
            f"{config.steps} steps of {config.batch_size} rows of {stage.length} tokens, "
            f"lr {config.learning_rate:g} {config.decay}, tiers by {config.tiers}"
            + (f", {config.short_share:.0%} short" if config.short_share else "")
            + (f", LoRA of rank {config.lora_rank}" if config.lora_rank else "")
        )
    return f"tiers for {', '.join(map(str, stage.lengths))} tokens"


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"
