"""Putting rescale factors into Hugging Face models, and taking them out again."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from longrope.factors import RescaleFactors
from longrope.patching.embedding import RescaledRotaryEmbedding
from longrope.patching.rotation import accept_rotations
from longrope.patching.settings import rope_parameters, rope_settings, text_config
from longrope.patching.tiers import install, uninstall

#: `model_type` of the configurations whose models `apply` takes. Each has `rotary_emb` in its
#: decoder and an `apply_rotary_pos_emb` that pairs channel `i` with `i + R/2`.
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")

#: Rope types that factors replace without a word: none at all, or an earlier LongRoPE export.
_REPLACED_SILENTLY = ("default", "longrope", "su")


def apply(model: nn.Module, factors: RescaleFactors | Sequence[RescaleFactors]) -> nn.Module:
    """Make a Hugging Face model use rescale factors, in place.

    Weights, state dict keys and configuration stay as they are, so `save_pretrained` afterwards
    writes the model without the factors. Other models of the same
    class are not affected. Applying again replaces the factors; `remove` takes them out.

    Parameters
    ----------
    model
        A transformers model of type Llama, Mistral or Qwen2, with or without its language model
        head. Any attention implementation, dtype and device.
    factors
        One set for every length, or a list of sets (tiers) with different `target_length`: a row
        of `n` tokens takes the shortest with `n <= target_length`, and the longest beyond that.
        Rows of a batch may differ: the length of a row is its largest position + 1, padding
        left out, or the number of its tokens where no `position_ids` are given. A row that grows
        out of its tier while it is generated has its cached keys turned into the next
        (`longrope.patching.tiers`); a cache must be filled after `apply`.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError
        Where the model has no rotary embedding or is of another type, and where `rope_theta` or
        `rotary_dim` of the factors are not the model's.
    """
    base = decoder(model)
    tiers = _tiers(factors)
    _check_fit(model, tiers)
    accept_rotations(base.layers[0].self_attn)
    remove(model)
    rotary = RescaledRotaryEmbedding(base.rotary_emb, tiers)
    device = next(base.parameters()).device
    base.rotary_emb = rotary if device.type == "meta" else rotary.to(device)
    install(base, rotary)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Give a model its own rotary embedding back, in place, bit for bit; returns the model.

    A model without factors is left as it is.
    """
    base = decoder(model)
    if isinstance(base.rotary_emb, RescaledRotaryEmbedding):
        uninstall(base.rotary_emb)
        base.rotary_emb = base.rotary_emb.original
    return model


def rotary_of(model: nn.Module) -> RescaledRotaryEmbedding:
    """Return the rotary module that `apply` has put into a model; `ValueError` if none."""
    rotary = decoder(model).rotary_emb
    if not isinstance(rotary, RescaledRotaryEmbedding):
        raise ValueError("model: expected a model with factors applied (longrope.apply)")
    return rotary


@contextlib.contextmanager
def rows(
    model: nn.Module,
    inv_freq: Tensor,
    start_tokens: Tensor | int = 0,
    attention_factor: Tensor | float = 1.0,
) -> Iterator[RescaledRotaryEmbedding]:
    """Give each row of the batches inside a `with` block its own factors.

    For evaluating many candidates in one forward pass, and for gradients with respect to them. Any
    factors that are applied to the model are back in force after the block; a model without any
    is unpatched again.

    Parameters
    ----------
    model
        As for `apply`.
    inv_freq
        float64 `[B, R/2]`, or `[R/2]` for all rows, radians per token. Gradients flow into it.
    start_tokens
        int or int64 `[B]`.
    attention_factor
        float or tensor `[B]` or `[]`. Gradients flow into it.
    """
    base = decoder(model)
    patched = isinstance(base.rotary_emb, RescaledRotaryEmbedding)
    if not patched:
        apply(model, _plain(model))
    rotary = base.rotary_emb
    before = rotary.rows
    try:
        rotary.set_rows(inv_freq, start_tokens, attention_factor)
        yield rotary
    finally:
        rotary.rows = before
        if not patched:
            remove(model)


@contextlib.contextmanager
def row_lengths(model: nn.Module, lengths: Tensor | int) -> Iterator[None]:
    """Choose tiers by the lengths that rows *will* have, inside a `with` block.

    For a prompt that is fed in chunks, whose first chunks do not show how long the row becomes.

    lengths
        int64 `[B]`, or one int for all rows.
    """
    rotary = rotary_of(model)
    before = rotary.planned_lengths
    try:
        rotary.planned_lengths = torch.as_tensor(lengths, dtype=torch.int64).reshape(-1)
        yield
    finally:
        rotary.planned_lengths = before


def decoder(model: nn.Module) -> nn.Module:
    """Return the module that holds the decoder layers and `rotary_emb`, or say why there is none.

    Looks through `torch.compile`, `DistributedDataParallel`, PEFT and the language model head.
    """
    inner = model
    for name in ("_orig_mod", "module"):
        inner = getattr(inner, name, inner)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    config = text_config(inner)
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        rope_settings(config)  # no rotary embedding at all is the better message
        raise ValueError(
            f"model: expected one of the model types {', '.join(SUPPORTED_MODEL_TYPES)}, "
            f'got "{config.model_type}"'
        )
    base = getattr(inner, "base_model", inner)
    if not hasattr(base, "rotary_emb"):
        raise ValueError(
            f"model: expected a decoder with rotary_emb, got {type(base).__name__} without one"
        )
    return base


def _plain(model: nn.Module) -> RescaleFactors:
    settings = rope_settings(model)
    return RescaleFactors.none(
        original_length=settings.original_length,
        rope_theta=settings.rope_theta,
        rotary_dim=settings.rotary_dim,
    )


def _tiers(factors: RescaleFactors | Sequence[RescaleFactors]) -> list[RescaleFactors]:
    tiers = [factors] if isinstance(factors, RescaleFactors) else factors
    if not isinstance(tiers, (list, tuple)):
        raise TypeError(
            f"factors: expected RescaleFactors or a list of them, got {type(tiers).__name__}"
        )
    for tier in tiers:
        if not isinstance(tier, RescaleFactors):
            raise TypeError(
                "factors: expected RescaleFactors or a list of them, "
                f"got an element of type {type(tier).__name__}"
            )
    if not tiers:
        raise ValueError("factors: expected at least one RescaleFactors, got an empty list")
    tiers = sorted(tiers, key=lambda tier: tier.target_length)
    for shorter, longer in itertools.pairwise(tiers):
        if shorter.target_length == longer.target_length:
            raise ValueError(
                "factors: expected tiers of different target_length, "
                f"got two of {longer.target_length} tokens"
            )
    return tiers


def _check_fit(model: nn.Module, tiers: Sequence[RescaleFactors]) -> None:
    settings = rope_settings(model)
    for tier in tiers:
        for name in ("rotary_dim", "rope_theta"):
            given, expected = getattr(tier, name), getattr(settings, name)
            if given != expected:
                raise ValueError(
                    f"factors: expected {name} {expected:g}, as in the model, got {given:g}"
                )
    rope_type = rope_parameters(text_config(model))["rope_type"]
    if rope_type not in _REPLACED_SILENTLY:
        warnings.warn(
            f'the model\'s own rope scaling "{rope_type}" is switched off while rescale factors '
            "are applied: they count from its unscaled frequencies",
            stacklevel=3,
        )
