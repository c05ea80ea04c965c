"""`LongRoPEModel.fit`: random windows, and transformers' Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longrope import _validation
from longrope.documents import as_documents, long_enough
from longrope.factor_search.windows import RandomWindows

if TYPE_CHECKING:
    from longrope.model.standalone import LongRoPEModel


class _Windows(torch.utils.data.IterableDataset):
    """Random windows without end; every iteration begins anew, with the same ones."""

    def __init__(self, documents: list[Tensor], length: int, seed: int):
        self.documents, self.length, self.seed = documents, length, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        windows = RandomWindows(self.documents, self.length, [], np.random.default_rng(self.seed))
        while True:
            window = windows.draw(1)[0]
            yield {"inputs": window, "labels": window}


def fit(
    model: LongRoPEModel,
    data: Iterable[Any],
    *,
    steps: int,
    batch_size: int,
    length: int | None,
    learning_rate: float,
    seed: int,
    progress: bool,
    **arguments: Any,
) -> None:
    """Train a model in place (`LongRoPEModel.fit`)."""
    steps = _validation.count("steps", steps)
    batch_size = _validation.count("batch_size", batch_size)
    length = model.base_length if length is None else _validation.integer("length", length, 2)
    learning_rate = _validation.positive("learning_rate", learning_rate)
    seed = _validation.natural("seed", seed)
    progress = _validation.switch("progress", progress)
    vocabulary = model.llama.config.vocab_size
    documents = as_documents(data, min_length=0, vocab_size=vocabulary, name="data")
    documents = long_enough(documents, length, "data")

    from transformers import PrinterCallback, Trainer, TrainingArguments

    settings = {
        "max_steps": steps, "per_device_train_batch_size": batch_size, "seed": seed,
        "learning_rate": learning_rate, "lr_scheduler_type": "cosine", "warmup_steps": steps // 20,
        "use_cpu": model.device.type == "cpu", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": not progress, "logging_strategy": "steps" if progress else "no",
        "logging_steps": max(1, steps // 20), "dataloader_pin_memory": model.device.type == "cuda",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as nowhere:  # the Trainer makes its folder in any case
        settings |= {"remove_unused_columns": False, "output_dir": nowhere} | arguments
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=_Windows(documents, length, seed),
        )
        if not progress:
            trainer.remove_callback(PrinterCallback)
        trainer.train()
