"""What documents are, and that they are what a measurement needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch


class Documents(list):
    """A list of documents that knows what its tokenizer puts in front of a text; so do its slices.

    Attributes
    ----------
    bos
        The id of the token that the tokenizer puts in front of every text, and that every document
        here begins with; None: the tokenizer adds none, or the tokens are bytes.
    """

    def __init__(self, documents: Iterable[Any], bos: int | None):
        super().__init__(documents)
        self.bos = bos

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return Documents(found, self.bos) if isinstance(index, slice) else found

    def __reduce__(self):
        return type(self), (list(self), self.bos)


def like(documents: Sequence[Any], kept: list[Any]) -> list[Any]:
    """Return `kept`, some of `documents`, as a list of the same kind."""
    return Documents(kept, documents.bos) if isinstance(documents, Documents) else kept


def long_enough(documents: Sequence[np.ndarray], least: int, where: str) -> list[np.ndarray]:
    """Return the documents of at least `least` tokens; `ValueError` where there is none."""
    kept = [document for document in documents if len(document) >= least]
    if not kept:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"{where} holds no document of at least {least} tokens "
            f"({len(documents)} documents, the longest {longest} tokens)"
        )
    return like(documents, kept)


def as_documents(
    documents: Iterable[Any],
    *,
    min_length: int = 2,
    vocab_size: int | None = None,
    name: str = "documents",
) -> list[torch.Tensor]:
    """Check documents and return them as integer CPU tensors of one dimension.

    Unsigned ids, as `load_data` returns them, stay what they are: int64 would take up to eight
    times their memory. All others become int64. Windows that are cut from a document become int64
    when they are cut.

    Raises `ValueError` with one sentence for an empty list, something that is not a sequence of
    integers, a document shorter than `min_length`, or a token id outside the vocabulary.
    """
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Iterable):
        raise ValueError(
            f"{name}: expected a list of documents of token ids, got {type(documents).__name__}"
        )
    result = []
    for index, document in enumerate(documents):
        where = f"{name}[{index}]"
        if isinstance(document, (str, bytes)):
            raise ValueError(f"{where}: expected token ids, got text (see longrope.load_data)")
        try:
            tokens = torch.as_tensor(document)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            kind = type(document).__name__
            raise ValueError(f"{where}: expected 1-D integer token ids, got {kind}") from None
        integer = not (tokens.is_floating_point() or tokens.is_complex())
        integer = integer and tokens.dtype != torch.bool
        if tokens.ndim != 1 or (tokens.numel() and not integer):
            kind = str(tokens.dtype).removeprefix("torch.")
            raise ValueError(
                f"{where}: expected 1-D integer token ids, got {kind} {list(tokens.shape)}"
            )
        if len(tokens) < min_length:
            raise ValueError(
                f"{where}: expected at least {min_length} tokens, got {len(tokens)}; "
                "leave out shorter documents"
            )
        compact = tokens.dtype in (torch.uint8, torch.uint16, torch.uint32)
        tokens = tokens.to("cpu", tokens.dtype if compact else torch.int64)
        if vocab_size is not None and len(tokens):
            values = tokens.numpy()  # torch finds no extremes of 16 and 32 unsigned bits
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"{where}: token id {low if low < 0 else high} is outside the model's "
                    f"vocabulary of {vocab_size}"
                )
        result.append(tokens)
    if not result:
        raise ValueError(f"{name}: expected at least one document, got none")
    return result
