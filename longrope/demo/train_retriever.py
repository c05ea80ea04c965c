"""Train the packaged retriever: `python -m longrope.demo.train_retriever --out DIR`.

A byte-level model of two layers (361,088 parameters, 0.7 MB) with a window of 512 tokens that finds
passkeys and needles, for measuring retrieval beyond that window where no large model is at hand.
Short windows come first: in them the layers find each other within a hundred steps. Seven minutes
on one CPU core.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longrope.demo.retrieval_text import ANSWER, COPIED, windows
from longrope.demo.train import optimizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 512
#: Stages of the training: the length of the windows, how many a step has, and the steps.
STAGES = ((128, 32, 300), (256, 16, 150), (512, 8, 150))
WARMUP_STEPS = 30
#: The rates fall to 0 along a line over this last part of the steps.
DECAY = 0.4
#: Steps between two lines of the report.
REPORT = 50


def build_model(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    """Return the untrained model, of Llama's shape or, with norms of q and k, of Qwen3's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | changes)))


def train(model: PreTrainedModel, seed: int, stages: tuple[tuple[int, int, int], ...]) -> None:
    """Train on fresh windows, and print how often the likeliest byte is the right one."""
    random, optimizer = np.random.default_rng(seed), optimizer_of(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = itertools.chain.from_iterable(
        [(length, rows)] * count for length, rows, count in stages
    )
    total = sum(count for _, _, count in stages)
    for step, (length, rows) in enumerate(steps):
        share = min(1, (step + 1) / WARMUP_STEPS, (total - step) / (DECAY * total))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        ids, weights = map(torch.from_numpy, windows(random, rows, length))
        logits, targets, weights = model(input_ids=ids).logits[:, :-1], ids[:, 1:], weights[:, 1:]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        ((nll * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        if (step + 1) % REPORT == 0:
            right = logits.argmax(-1) == targets
            key, copied = (right[weights == kind].float().mean() for kind in (ANSWER, COPIED))
            print(f"step {step + 1}/{total}, windows of {length}: right of the bytes of passkeys "
                  f"{key:.3f}, of other copies {copied:.3f}", flush=True)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    p.add_argument("--kind", choices=("llama", "qwen3"), default="llama", help="shape of the model")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--scale", type=float, default=1.0, help="share of the steps of every stage")
    args = p.parse_args(argv)
    torch.manual_seed(args.seed)
    model = build_model(args.kind)
    train(model, args.seed, tuple((n, rows, round(args.scale * k)) for n, rows, k in STAGES))
    model.to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
