"""A tiny model whose perplexity depends on the rescale factors, and documents for it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 40


def build_model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.4,  # predictions far from uniform, so that positions matter
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def shared_model():
    """The model, for tests that leave it as it is."""
    return build_model()


@pytest.fixture
def model():
    """A model of the test's own."""
    return build_model()


@pytest.fixture(scope="session")
def documents():
    """Eight documents of 70 tokens: two windows of 32 each."""
    generator = torch.Generator().manual_seed(5)
    return list(torch.randint(VOCABULARY, (8, 70), generator=generator))
