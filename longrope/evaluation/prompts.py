"""Prompts: from text to the token ids that a model reads, and from what it writes back to text."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from longrope._validation import count
from longrope.documents import Documents
from longrope.documents.tokens import Encoder
from longrope.evaluation.modes import vocabulary
from longrope.evaluation.start import bos_token


class PromptTokens:
    """Turns the parts of a prompt into token ids, for any tokenizer.

    Parameters
    ----------
    tokenizer
        None: the UTF-8 bytes. A Hugging Face tokenizer, or a function from `str` to token ids.
    model
        The causal language model that reads them.
    bos
        As in `longrope.perplexity`.

    Attributes
    ----------
    start
        The ids in front of every prompt: BOS, or nothing.

    Raises
    ------
    ValueError
        Where the tokenizer is none.
    """

    def __init__(self, tokenizer: Any, model: nn.Module, bos: str | bool | int = "auto"):
        self._encoder = Encoder(tokenizer)
        self._vocabulary = vocabulary(model)
        known = Documents([], self._encoder.bos) if self._encoder.knows_bos else []
        token = bos_token(bos, model, known)
        self.start: list[int] = [] if token is None else [token]

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS.

        Raises `ValueError` for ids that the model has no embedding of.
        """
        ids = self._encoder.bare(text)
        low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
        if self._vocabulary is not None and not 0 <= low <= high < self._vocabulary:
            raise ValueError(
                f"tokenizer: expected ids within the model's vocabulary of {self._vocabulary}, "
                f"got {low if low < 0 else high}"
            )
        return ids.tolist()

    def split(self, text: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the ids of a text that ends in an answer: those before it, and its own.

        The two are encoded together, as the model has seen them: a token that spans the joint
        belongs to the answer.
        """
        before, whole = self(text), self(text + answer)
        pairs = zip(before, whole[:-1], strict=False)  # at least one token answers
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if shared is None:
            shared = min(len(before), len(whole) - 1)
        return whole[:shared], whole[shared:]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids that the model has written, special tokens left out.

        Raises `ValueError` where the tokenizer is a function, which does not go back.
        """
        tokenizer = self._encoder.tokenizer
        if tokenizer is None:
            return bytes(i for i in ids if i < 256).decode(errors="replace")
        if not hasattr(tokenizer, "decode"):
            raise ValueError(
                "tokenizer: expected one with decode, for answers that are text, got "
                f"{type(tokenizer).__name__}"
            )
        return tokenizer.decode(ids, skip_special_tokens=True)


def check_lengths(lengths: Any) -> list[int]:
    """Return lengths in tokens, each once and in order; `ValueError` for anything else."""
    try:
        given = list(lengths)
    except TypeError:
        given = []
    if not given or isinstance(lengths, (str, bytes)):
        raise ValueError(f"lengths: expected one or more numbers of tokens, got {lengths!r}")
    return sorted({count("lengths", int(n) if isinstance(n, np.integer) else n) for n in given})
