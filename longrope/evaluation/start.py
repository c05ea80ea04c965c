"""Which token stands in front of every window: BOS, or none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from longrope._validation import checked_bos
from longrope.documents import Documents
from longrope.evaluation.modes import vocabulary
from longrope.patching.wrappers import language_model

#: Rows of an embedding of bytes, which have no room for a token that is no byte.
_BYTES = 256


def bos_token(bos: str | bool | int, model: nn.Module, documents: Iterable[Any]) -> int | None:
    """Return the token that stands in front of every window; None: there is none.

    Parameters
    ----------
    bos
        `"auto"`: for documents of `load_data`, the token that their tokenizer puts in front of a
        text, if it does; for all others the `bos_token_id` of the model's config, if it names one.
        A model of bytes (a vocabulary of 256) has none. True: the token of the tokenizer or else
        of the config. False: none. A number: this token.
    model
        A causal language model.
    documents
        What the windows are cut from.

    Raises
    ------
    ValueError
        Where there is no token for True, or it is outside the vocabulary.
    """
    bos = checked_bos("bos", bos)
    if bos is False:
        return None
    size = vocabulary(model)
    token = None if isinstance(bos, (str, bool)) else bos
    if token is None:
        known = isinstance(documents, Documents)
        token = documents.bos if known else None
        if bos is True or not (known or size == _BYTES):
            token = _of_config(model) if token is None else token
    if token is None and bos is True:
        raise ValueError(
            "bos: expected a model whose config names a bos_token_id with bos=True, got none; "
            "give the token's id"
        )
    if token is not None and size is not None and token >= size:
        if bos == "auto":  # transformers' default for a small model, such as 50256
            return None
        raise ValueError(f"bos: expected a token of the model's vocabulary of {size}, got {token}")
    return token


def _of_config(model: nn.Module) -> int | None:
    config = getattr(language_model(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    token = getattr(config, "bos_token_id", None)
    if isinstance(token, (list, tuple)):
        token = token[0] if token else None
    return token if isinstance(token, int) and not isinstance(token, bool) else None


def without_bos(documents: Iterable[torch.Tensor], bos: int | None) -> list[torch.Tensor]:
    """Return the documents without `bos` at their start, which every window gets anew."""
    texts = []
    for document in documents:
        start = 0
        while bos is not None and start < len(document) and int(document[start]) == bos:
            start += 1
        texts.append(document[start:])
    return texts


def with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Return windows int64 `[S, N]` with the token `bos` in front: `[S, N + 1]`; None: as is."""
    if bos is None:
        return windows
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)
