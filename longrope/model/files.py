"""What a `LongRoPEModel` is on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longrope._files import new_folder
from longrope._warnings import warn
from longrope.checkpoints.export import export as export_factors
from longrope.checkpoints.export import free_folder
from longrope.checkpoints.hf import ABOUT
from longrope.checkpoints.load import load as load_export
from longrope.factors import Tiers
from longrope.patching import rope_settings, rotary_of
from longrope.patching.saving import exporting
from longrope.patching.settings import LENGTH_DEPENDENT

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from longrope.model.standalone import LongRoPEModel

TIERS = "tiers.json"
#: The key of `config.json` that says whether the weights are more than random.
TRAINED = "longrope_trained"


def check_llama(llama: Any) -> None:
    """Refuse a model that `LongRoPEModel` does not compute."""
    from transformers import LlamaForCausalLM

    if not isinstance(llama, LlamaForCausalLM):
        raise ValueError(f"llama: expected a LlamaForCausalLM, got {type(llama).__name__}")
    rope_type = rope_settings(llama).rope_type
    if rope_type in LENGTH_DEPENDENT:
        raise ValueError(
            f'llama: expected angles that no length changes, got rope type "{rope_type}"'
        )


def save(model: LongRoPEModel, path: str | os.PathLike) -> Path:
    """Write a model into a new folder."""
    path = free_folder(path)
    with _marked(model), new_folder(path) as folder, exporting():
        model.llama.save_pretrained(folder)
        model.tiers.save(folder / TIERS)
    return path


@contextlib.contextmanager
def _marked(model: LongRoPEModel) -> Iterator[None]:
    """Let the configuration that is written say whether the weights are more than random."""
    setattr(model.llama.config, TRAINED, model.trained)
    try:
        yield
    finally:
        delattr(model.llama.config, TRAINED)


def read(
    path: str | os.PathLike, dtype: torch.dtype | None, device: Any
) -> tuple[LlamaForCausalLM, Tiers | None, bool]:
    """Return the weights of a folder, its tiers if it names any, and whether it is trained."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path, options = Path(path), {"dtype": "auto" if dtype is None else dtype}
    if (path / ABOUT).is_file():
        llama, _ = load_export(path, **options)
        trained = vars(llama.config).pop(TRAINED, True)
        return llama.to(device), rotary_of(llama).tiers, trained
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"path: expected a folder with a config.json, got {str(path)!r}")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    trained = vars(config).pop(TRAINED, True)  # of the folder, not of the weights
    llama = AutoModelForCausalLM.from_pretrained(path, config=config, **options)
    tiers = Tiers.load(path / TIERS) if (path / TIERS).is_file() else None
    return llama.to(device), tiers, trained


def export(model: LongRoPEModel, path: str | os.PathLike, options: dict[str, Any]) -> Path:
    """Write a folder that plain transformers reads; one of random weights says that it is."""
    if not model.trained:
        warn("model: its weights are random, and those of the export are too (fit trains them)")
        with _marked(model):
            return _export(model, path, options)
    return _export(model, path, options)


def _export(model: LongRoPEModel, path: str | os.PathLike, options: dict[str, Any]) -> Path:
    if model.context_length > model.base_length:
        return export_factors(model.llama, path, model.tiers, **options)
    if options:
        raise ValueError(
            f"{next(iter(options))}: expected no options for a model that is not extended"
        )
    path = free_folder(path)
    with new_folder(path) as folder:
        model.llama.save_pretrained(folder)
    return path
