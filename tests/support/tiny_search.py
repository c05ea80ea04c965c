"""A tiny model whose perplexity depends on the rescale factors, and documents for it."""

from __future__ import annotations

import torch

from support import tiny_models

VOCABULARY = 40
#: Smaller than the models of `tiny_models`, with a window of 16 tokens.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,  # predictions far from uniform, so that positions matter
    "pad_token_id": None,
}
#: A search of a second by Algorithm 1.
SMALL = {
    "method": "evolution",
    "target_length": 32,
    "samples": 2,
    "population": 6,
    "mutations": 3,
    "crossovers": 2,
    "iterations": 4,
    "parents": 4,
    "progress": False,
}


def build_model():
    """Return the model, in eval mode; the same weights at every call."""
    return tiny_models.build(**SIZES)


def build_documents():
    """Return eight documents of 70 tokens: two windows of 32 each."""
    generator = torch.Generator().manual_seed(5)
    return list(torch.randint(VOCABULARY, (8, 70), generator=generator))
