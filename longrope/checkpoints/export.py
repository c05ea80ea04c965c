"""`longrope.export`: checkpoints that programs without longrope read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from longrope._files import new_folder
from longrope._validation import choice
from longrope.checkpoints import card, gguf, hf, source
from longrope.checkpoints.measured import Measured
from longrope.checkpoints.plan import plan_export
from longrope.factors import RescaleFactors, Tiers
from longrope.patching.wrappers import is_sharded, unwrapped

FORMATS = ("hf", "gguf")


def export(
    model: nn.Module,
    path: str | os.PathLike,
    factors: RescaleFactors | Tiers,
    short: str | RescaleFactors = "long",
    format: str = "hf",
    drop_start_tokens: bool = False,
    *,
    gguf_type: str | None = None,
    tokenizer: Any = None,
    measured: Measured | None = None,
    found: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model with rescale factors as a folder that other programs read.

    The folder appears whole or not at all. Format "hf" is for plain transformers, vLLM and the
    like: rope type "longrope" in `config.json`, safetensors split as in the folder that the model
    came from, its tokenizer, chat template, generation configuration and licence, a model card, and
    `longrope.json`, from which `longrope.load` gives back the model with its tiers by position.
    Format "gguf" is for llama.cpp: one file of its llama architecture, and a card.

    Readers know the paper's rule alone: a sequence of at most the original length is turned by
    short factors, a longer one by long factors, all of it, with one attention factor. In single
    prefills that is `apply(model, [short with long's attention factor, long], tiers="row")`.

    Parameters
    ----------
    model
        A transformers model of a family in `longrope.patching.FAMILIES`. Whether factors are
        applied to it makes no difference.
    path
        The folder to write: new, or empty.
    factors
        One set, or tiers, whose last is the long factors. A single set comes back from
        `longrope.load` as the last tier of `factors.ladder()`. Of factors by layer and head readers
        get one set for all, which is what they know (llama.cpp's file too, whose tensor of factors
        has no layer in its name): the one that their search began with (`RescaleFactors.shared`,
        which files keep), and the mean where that is not known.
    short
        `"long"`: the long factors for every length, so that nothing changes when a sequence grows.
        `"none"`: the model as loaded for sequences within its window, that of its own scaling
        included. Or factors with a smaller `target_length`. Readers change sets by what they call
        `original_max_position_embeddings`: it is the `target_length` of the short factors, and with
        `"none"` on a model with a scaling not the window that lambdas count from, which
        `longrope.json` keeps.
    format
        `"hf"` or `"gguf"`.
    drop_start_tokens
        Leave out start tokens, which no reader knows, instead of refusing factors with some.
        `longrope.measure_export` says what that costs.
    gguf_type
        How a GGUF file stores matrices: `"f32"`, `"f16"`, `"bf16"` or `"q8_0"`; None: as the model.
        For format "gguf" alone.
    tokenizer
        A tokenizer to save, with format "hf" alone; None: that of the folder the model came from.
    measured
        Of `longrope.measure_export`, for the card, which says otherwise that nothing was measured.
    found
        How the factors were found (method, data, seeds), for the card and `longrope.json`. JSON.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        In one sentence, and before anything is written: a folder that holds something, factors of
        another model or that do not go beyond its window, start tokens, a model that the format
        cannot express.
    OSError
        In one sentence, where the folder cannot be written; nothing of it is left.
    """
    check_format(format, gguf_type)
    source.checked_tokenizer("tokenizer", tokenizer)
    if tokenizer is not None and format == "gguf":
        raise ValueError(
            "tokenizer: expected None with format 'gguf', which takes that of the folder that the "
            f"model came from, got {type(tokenizer).__name__}"
        )
    if measured is not None and not isinstance(measured, Measured):
        raise ValueError(
            "measured: expected None or what longrope.measure_export returns, got "
            f"{type(measured).__name__}"
        )
    model = _inner(model)
    plan = plan_export(model, factors, short, drop_start_tokens)
    path = free_folder(path)
    if format == "hf":
        hf.warn_of_versions(plan)
    else:
        gguf_type = gguf.check(model, gguf_type, plan.long.target_length)
    with _one_sentence(path), new_folder(path) as folder:
        if format == "hf":
            hf.write(model, folder, plan, tokenizer, found)
            notes = [hf.only_version_5(plan)]
        else:
            notes = gguf.write(model, folder / gguf.NAME, plan, gguf_type)
        licences = source.carry_licence(source.source_folder(model), folder)
        text = card.text(
            model, plan, format, licences, measured, found, [note for note in notes if note]
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
    return path


def check_format(format: str, gguf_type: str | None) -> None:
    """Raise `ValueError` for a format, or a type of its weights, that there is not."""
    choice("format", format, FORMATS)
    if gguf_type is None:
        return
    if format == "hf":
        raise ValueError(f"gguf_type: expected None with format 'hf', got {gguf_type!r}")
    choice("gguf_type", gguf_type, tuple(gguf.TYPES))


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile` and data parallelism; refuse what is not exported."""
    if is_sharded(model):
        raise ValueError("model: expected whole weights, got weights that FSDP shares out")
    model = unwrapped(model)
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "model: expected a model without adapters, got a PEFT model (merge_and_unload first)"
        )
    config = getattr(model, "config", None)
    if config is not None and config.get_text_config() is not config:
        raise ValueError(
            f'model: expected a text model, got model_type "{config.model_type}" (export its '
            "language model)"
        )
    return model


def free_folder(path: str | os.PathLike) -> Path:
    """Return the path of a folder that is not there yet or empty; refuse any other."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path: expected a path, got {type(path).__name__}")
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"path: expected a new or an empty folder, got {str(path)!r}, which is not"
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"path: expected a folder, got the file {str(path)!r}")
    return path


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Say in one sentence why a folder cannot be written."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise type(error)(f"path: cannot write {path}: {error.strerror or error}") from None
    except SafetensorError as error:  # its I/O errors are no OSError
        raise OSError(f"path: cannot write {path}: {error}") from None
