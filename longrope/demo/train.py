"""Train the packaged tiny model: `python -m longrope.demo.train --out DIR`.

A byte-level Llama with a context of 256 tokens, trained on the files of Python's standard library
whose role is `"train"` (see `longrope.demo.corpus`). About half an hour on two CPU cores. Needs
`accelerate` (`pip install longrope[train]`), because transformers' Trainer does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from longrope.demo import corpus

CONTEXT = 256


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


def build_model():
    """Return the untrained model: 3.5 M parameters, head_dim 128, rope_theta 10000."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def write_held_out_list(path: Path) -> None:
    """Write the held-out files of this interpreter, one `role path` a line."""
    lines = [
        f"{wanted} {name}" for wanted in ("search", "test") for name in corpus.source_files(wanted)
    ]
    path.write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, help="steps between checkpoints; default: none")
    args = parser.parse_args(argv)

    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(args.seed)
    model = build_model()
    documents = corpus.documents("train", min_length=CONTEXT)
    print(f"{sum(map(len, documents)):,} bytes in {len(documents)} files, "
          f"{model.num_parameters():,} parameters")  # fmt: skip
    trainer = Trainer(
        model=model,
        train_dataset=RandomWindows(documents, args.steps * args.batch, args.seed),
        args=TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            adam_beta2=0.95,
            weight_decay=0.1,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_strategy="steps" if args.save_every else "no",
            save_steps=args.save_every or args.steps,
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
    )
    trainer.train()
    model.to(torch.bfloat16).save_pretrained(args.out)
    write_held_out_list(args.out / corpus.HELD_OUT_LIST.name)


if __name__ == "__main__":
    main()
