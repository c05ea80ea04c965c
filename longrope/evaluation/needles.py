"""Needles: windows that ask at their end for what they said near their beginning.

LongRoPE2 (arXiv 2502.20082) searches by the loss of such answers alone, because the perplexity of
all tokens is mostly decided by near ones. Here a needle is a key and an answer of random tokens of
the window's own text, so it fits any tokenizer: `... key answer ... key answer`. Only the second
answer is scored, and only a model that looks back to the first can know it.
"""

from __future__ import annotations

import numpy as np
import torch

KEY_TOKENS = 8
ANSWER_TOKENS = 16
#: The needle lies in this first part of the window.
FIRST_PART = 0.1
#: The shortest window: half of it text.
SHORTEST = 4 * (KEY_TOKENS + ANSWER_TOKENS)


def plant(windows: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Return the windows with a needle near the start of each, and the same needle at its end.

    `windows` is int64 `[S, N]`, `N >= SHORTEST`; so is the result. The end of each window's text
    makes room for the needles.
    """
    planted = []
    for window in windows:
        size = KEY_TOKENS + ANSWER_TOKENS
        needle = window[torch.from_numpy(random.integers(len(window), size=size))]
        text = window[: len(window) - 2 * size]
        place = int(random.integers(int(FIRST_PART * len(window)), endpoint=True))
        planted.append(torch.cat([text[:place], needle, text[place:], needle]))
    return torch.stack(planted)
