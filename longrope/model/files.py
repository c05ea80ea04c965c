"""What a `LongRoPEModel` is on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longrope._files import new_folder
from longrope.checkpoints.export import export as export_factors
from longrope.checkpoints.export import free_folder
from longrope.factors import Tiers
from longrope.patching import rope_settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from longrope.model.standalone import LongRoPEModel

TIERS = "tiers.json"
#: The key of `config.json` that says whether the weights are more than random.
TRAINED = "longrope_trained"


def check_llama(config: Any) -> None:
    """Refuse the configuration of a model that `LongRoPEModel` does not compute."""
    kind = getattr(config, "model_type", None) or type(config).__name__
    if kind != "llama":
        raise ValueError(f'llama: expected a LlamaForCausalLM, got "{kind}"')
    if rope_settings(config).loaded is None:
        raise ValueError('llama: expected angles that no length changes, got rope type "dynamic"')


def save(model: LongRoPEModel, path: str | os.PathLike) -> Path:
    """Write a model into a new folder."""
    path, config = free_folder(path), model.llama.config
    setattr(config, TRAINED, model.trained)
    try:
        with new_folder(path) as folder:
            model.llama.save_pretrained(folder)
            model.tiers.save(folder / TIERS)
    finally:
        delattr(config, TRAINED)
    return path


def read(
    path: str | os.PathLike, dtype: torch.dtype | None, device: Any
) -> tuple[LlamaForCausalLM, Tiers | None, bool]:
    """Return the weights of a folder, its tiers if it names any, and whether it is trained."""
    from transformers import AutoConfig, LlamaForCausalLM

    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"path: expected a folder with a config.json, got {str(path)!r}")
    config = AutoConfig.from_pretrained(path)
    check_llama(config)
    trained = getattr(config, TRAINED, True)
    llama = LlamaForCausalLM.from_pretrained(
        path, config=config, dtype="auto" if dtype is None else dtype
    )
    if hasattr(llama.config, TRAINED):
        delattr(llama.config, TRAINED)  # of the folder, not of the weights
    tiers = Tiers.load(path / TIERS) if (path / TIERS).is_file() else None
    if tiers is not None and len(tiers) == 1 and tiers[0] == rope_settings(config).loaded:
        tiers = None  # not extended
    return llama.to(device), tiers, trained


def export(model: LongRoPEModel, path: str | os.PathLike, options: dict[str, Any]) -> Path:
    """Write a folder that plain transformers reads."""
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
