"""Train the packaged tiny model: `python -m longrope.demo.train --out DIR`.

A byte-level Llama with a context of 256 tokens, trained on the files of Python's standard library
whose role is `"train"` (see `longrope.demo.corpus`). 24 minutes on one CPU core with `--compile`
(an AMD EPYC with AVX512-BF16). Needs `accelerate` (`pip install longrope[train]`), because
transformers' Trainer does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longrope.demo import corpus
from longrope.evaluation.memory import processor_multiplies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 256
#: Learning rates: of Muon for the matrices of the layers, and of AdamW for the rest.
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3
WARMUP_STEPS = 60
#: The rates fall to 0 along a line over this last part of the steps.
DECAY = 0.6


class RandomWindows(torch.utils.data.Dataset):
    """`count` windows of `CONTEXT` bytes, drawn uniformly over all bytes of the documents.

    Window `i` depends on `(seed, i)` alone, so a run is the same for any number of workers.
    """

    def __init__(self, documents: list[np.ndarray], count: int, seed: int):
        self.documents = documents
        # A document of n bytes has n - CONTEXT + 1 windows.
        self.ends = np.cumsum([len(d) - CONTEXT + 1 for d in documents])
        self.picks = np.random.default_rng(seed).integers(self.ends[-1], size=count)

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pick = self.picks[index]
        which = int(np.searchsorted(self.ends, pick, side="right"))
        start = int(pick - (self.ends[which - 1] if which else 0))
        window = torch.from_numpy(self.documents[which][start : start + CONTEXT].copy())
        return {"input_ids": window, "labels": window}


class Together(torch.optim.Optimizer):
    """Several optimizers, each with its own parameters, as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([p for part in parts for g in part.param_groups for p in g["params"]], {})
        self.param_groups = [dict(group) for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        """Let each part make its step, at the rates that a schedule has set here."""
        groups = iter(self.param_groups)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = next(groups)["lr"]
            part.step()


def optimizer_of(model: PreTrainedModel) -> Together:
    """Return Muon for the matrices of the layers and AdamW for embeddings and norms.

    On a budget of minutes Muon gets much further than AdamW alone: 730 steps of 16 windows ended at
    a perplexity of 3.00 on unseen files, 2500 of AdamW at a rate of 1e-3 at 2.95 to 3.16.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        of_layer = parameter.ndim == 2 and "embed" not in name
        (matrices if of_layer else others).append(parameter)
    return Together(
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )


def build_model(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """Return the untrained model: 3.5 M parameters, head_dim 64, rope_theta 10000.

    `changes` are fields of its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "attention_bias": True,  # as Qwen2's; it bears longer windows better (docs/demo.md)
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings | changes))


def train(
    model: PreTrainedModel, documents: list[np.ndarray], out: Path, args: argparse.Namespace
) -> None:
    """Train on random windows of the documents, and save in bfloat16."""
    from transformers import Trainer, TrainingArguments
    from transformers.optimization import get_wsd_schedule

    print(f"{sum(map(len, documents)):,} bytes in {len(documents)} files, "
          f"{model.num_parameters():,} parameters")  # fmt: skip
    optimizer = optimizer_of(model)
    schedule = get_wsd_schedule(
        optimizer, min(WARMUP_STEPS, args.steps // 10), int(DECAY * args.steps), args.steps,
        decay_type="linear",
    )  # fmt: skip
    gpu = torch.cuda.is_available()
    Trainer(
        model=model,
        train_dataset=RandomWindows(documents, args.steps * args.batch, args.seed),
        optimizers=(optimizer, schedule),
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            # Elsewhere autocast costs a step several times its time in float32.
            bf16=gpu or processor_multiplies(torch.bfloat16),
            use_cpu=not gpu,
            torch_compile=args.compile,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=gpu,
        ),
    ).train()
    model.to(torch.bfloat16).save_pretrained(out)


def parser(description: str, steps: int) -> argparse.ArgumentParser:
    """Return the options of a training run."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    p.add_argument("--steps", type=int, default=steps)
    p.add_argument("--batch", type=int, default=16, help="windows per step")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--compile", action="store_true", help="with torch.compile: 1.4x as fast")
    return p


def write_held_out_list(path: Path) -> None:
    """Write the held-out files of this interpreter, one `role path` a line."""
    lines = [
        f"{wanted} {name}" for wanted in ("search", "test") for name in corpus.source_files(wanted)
    ]
    path.write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__.splitlines()[0], steps=1400).parse_args(argv)
    from transformers import set_seed

    set_seed(args.seed)
    documents = corpus.documents("train", min_length=CONTEXT, with_tests=True)
    train(build_model(), documents, args.out, args)
    write_held_out_list(args.out / corpus.HELD_OUT_LIST.name)


if __name__ == "__main__":
    main()
