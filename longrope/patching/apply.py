"""Putting rescale factors into Hugging Face models, and taking them out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from longrope.factors import RescaleFactors, Tiers
from longrope.patching import cache_guard, layers, row_tiers, tiered
from longrope.patching.attention import use_own_attention, use_tiered_attention
from longrope.patching.embedding import RescaledRotaryEmbedding
from longrope.patching.families import attention_layers, decoder
from longrope.patching.notices import warn_of_factors, without_windows
from longrope.patching.rotation import accept_rotations
from longrope.patching.saving import warn_on_save
from longrope.patching.settings import RopeSettings, rope_settings
from longrope.patching.tier_cache import stays_as_loaded
from longrope.patching.tiered import TieredRotaryEmbedding
from longrope.patching.wrappers import device_of


def apply(
    model: nn.Module,
    factors: RescaleFactors | Tiers | Sequence[RescaleFactors],
    tiers: str = "position",
    *,
    cached_keys: str = "turned",
) -> nn.Module:
    """Make a Hugging Face model use rescale factors, in place.

    Weights, state dict keys and configuration stay as they are, so `save_pretrained` afterwards
    writes the model without the factors, and warns of it (`longrope.export` writes them). Other
    models of the same class are not affected. Applying again replaces the factors; `remove` takes
    them out.

    One set of factors holds for every length. Several are tiers, by position unless `tiers` says
    otherwise: the token at position `p` attends under the first tier with `p < target_length`, the
    last beyond all of them, its query and all of its keys turned by that tier. So its hidden states
    depend on the tokens before it alone: logits do not change with batch mates, with cuts of the
    prefill or with what is generated afterwards, and nothing is computed twice when a row crosses
    into the next tier. Where the first tier is the model as loaded (`rope_settings(model).loaded`,
    as `RescaleFactors.ladder` has it), its tokens are turned by the model's own rotary module, and
    passes wholly within it, without a cache or with a growing one, are the unpatched model's bit
    for bit. Positions are `position_ids` where they are given, else they count the tokens that
    `attention_mask` does not hide.

    Parameters
    ----------
    model
        A transformers model of a family in `longrope.patching.FAMILIES`, or one that works like
        them in a trial on a tiny copy of its class; with or without its language model head. Any
        attention implementation, dtype and device.
    factors
        One set, `Tiers`, or a list of sets with different `target_length`.
    tiers
        `"position"`; or `"row"`, the paper's rule: all tokens of a row take the tier of the row's
        length, the shortest with `n <= target_length`. The length of a row is its largest position
        + 1, padding left out, or what `longrope.row_lengths` says. A row that grows out of its
        tier has its cached keys turned into the next, but not what deeper layers computed from
        the keys before. For comparison, and what readers of exports do.
    cached_keys
        With tiers by position, from the second tier on: `"turned"` keeps the keys in a cache turned
        by the tier of their row, and turns them in place when the row enters the next;
        `"unrotated"` keeps them as they are and turns all of them whenever they are read.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError
        Where the model has no rotary embedding or fails the trial, where `rope_theta` or
        `rotary_dim` of the factors are not the model's, or two sets have one target length.

    Warns
    -----
    UserWarning
        Where the model is of no family that is tested; has a scaling of its own, which the factors
        replace; has another window than the one from which the factors count; or has a sliding
        window shorter than the target in every layer.
    """
    check_tiers(tiers)
    if cached_keys not in ("turned", "unrotated"):
        raise ValueError(f'cached_keys: expected "turned" or "unrotated", got {cached_keys!r}')
    several = _tiers(factors)
    _install(model, several, tiers == "position", cached_keys)
    warn_of_factors(model, several, as_loaded=_first_by_model(model))
    return model


def check_tiers(tiers: str) -> None:
    """Refuse in one sentence what `apply` does not take as `tiers`."""
    if tiers not in ("position", "row"):
        raise ValueError(f'tiers: expected "position" or "row", got {tiers!r}')


def _install(model: nn.Module, several: Tiers, by_position: bool, cached_keys: str) -> None:
    """Do what `apply` says, without a word."""
    base, settings = decoder(model), rope_settings(model)
    check_fit(settings, several, base)
    accept_rotations(attention_layers(base)[0])
    by_position = by_position and len(several) > 1
    remove(model)
    warn_on_save()
    first_by_model = by_position and tiered.loaded_tier(settings, several)
    if by_position:
        check_windows(base, several)
        use_tiered_attention(base)
        rotary = TieredRotaryEmbedding(
            base.rotary_emb, several, first_by_model, cached_keys == "unrotated"
        )
    else:
        rotary = RescaledRotaryEmbedding(base.rotary_emb, several)
    rotary.place(device_of(model))
    base.rotary_emb = rotary
    (tiered if by_position else row_tiers).install(base, rotary)
    if not by_position and any(tier.per_head for tier in several):
        rotary.hooks += layers.install(base)
    if len(several) == 1:
        rotary.hooks += cache_guard.install(base, several[0])


def _first_by_model(model: nn.Module) -> bool:
    """Say whether a model's own rotary module turns the first tier that is applied to it."""
    return getattr(decoder(model).rotary_emb, "first_by_model", False)


def remove(model: nn.Module) -> nn.Module:
    """Give a model its own rotary embedding back, in place, bit for bit; returns the model.

    A model without factors is left as it is.
    """
    base = decoder(model)
    rotary = base.rotary_emb
    if isinstance(rotary, (RescaledRotaryEmbedding, TieredRotaryEmbedding)):
        for hook in rotary.hooks:
            hook.remove()
        base.rotary_emb = rotary.original
    if isinstance(rotary, TieredRotaryEmbedding):
        use_own_attention(base)
    return model


def rotary_of(model: nn.Module) -> RescaledRotaryEmbedding | TieredRotaryEmbedding:
    """Return the rotary module that `apply` has put into a model; `ValueError` if none."""
    rotary = decoder(model).rotary_emb
    if not isinstance(rotary, (RescaledRotaryEmbedding, TieredRotaryEmbedding)):
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
        float64 `[B, R/2]`, or `[R/2]` for all rows, radians per token. Gradients flow into it. By
        layer and group of heads `[L, B or 1, G, R/2]`.
    start_tokens
        int or int64 `[B]`.
    attention_factor
        float or tensor `[B]` or `[]`, by layer and group of heads `[L, B or 1, G]`. Gradients flow
        into it.
    """
    base = decoder(model)
    found = base.rotary_emb
    patched = isinstance(found, RescaledRotaryEmbedding)
    if not patched:
        _install(model, _plain(model), False, "turned")
    rotary = base.rotary_emb
    before = rotary.rows
    picking = layers.install(base)
    try:
        rotary.set_rows(inv_freq, start_tokens, attention_factor)
        yield rotary
    finally:
        for hook in picking:
            hook.remove()
        rotary.rows = before
        if not patched:
            _apply_again(model, found)


@contextlib.contextmanager
def factors_kept(model: nn.Module) -> Iterator[None]:
    """Give a model the factors back that are applied to it, if any, after a block."""
    rotary = decoder(model).rotary_emb
    try:
        yield
    finally:
        _apply_again(model, rotary)


@contextlib.contextmanager
def without_factors(model: nn.Module) -> Iterator[nn.Module]:
    """Take applied factors out for the time of a block; yields the decoder."""
    with factors_kept(model):
        yield decoder(remove(model))


def _apply_again(model: nn.Module, rotary: nn.Module) -> None:
    """Apply what a rotary module, which was taken out, had applied, and nothing else."""
    remove(model)
    if isinstance(rotary, TieredRotaryEmbedding):
        _install(model, rotary.tiers, True, "unrotated" if rotary.keeps_unrotated else "turned")
    elif isinstance(rotary, RescaledRotaryEmbedding):
        _install(model, rotary.tiers, False, "turned")


@contextlib.contextmanager
def row_lengths(model: nn.Module, lengths: Tensor | int) -> Iterator[None]:
    """Choose tiers by the lengths that rows *will* have, inside a `with` block.

    For a prompt that is fed in chunks, whose first chunks do not show how long the row becomes.

    lengths
        int64 `[B]`, or one int for all rows.
    """
    rotary = rotary_of(model)
    if isinstance(rotary, TieredRotaryEmbedding):
        raise ValueError(
            'model: expected tiers by row (longrope.apply(..., tiers="row")), got tiers by '
            "position, which lengths do not change"
        )
    before = rotary.planned_lengths
    try:
        rotary.planned_lengths = torch.as_tensor(lengths, dtype=torch.int64).reshape(-1)
        yield
    finally:
        rotary.planned_lengths = before


def _plain(model: nn.Module) -> Tiers:
    settings = rope_settings(model)
    return Tiers([RescaleFactors.none(**settings.lengths(settings.original_length))])


def _tiers(factors: RescaleFactors | Tiers | Sequence[RescaleFactors]) -> Tiers:
    if isinstance(factors, Tiers):
        return factors
    if not isinstance(factors, (RescaleFactors, list, tuple)):
        raise TypeError(
            f"factors: expected RescaleFactors or a list of them, got {type(factors).__name__}"
        )
    try:
        return Tiers(factors)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("tiers:", "factors:", 1)) from None


def check_fit(settings: RopeSettings, tiers: Tiers, base: nn.Module | None = None) -> None:
    """Refuse factors of a model with another rotary embedding, or other layers than a decoder's.

    Without `base`, the decoder, layers are not looked at.
    """
    for name in ("rotary_dim", "rope_theta"):
        given, expected = getattr(tiers[0], name), getattr(settings, name)
        if given != expected:
            raise ValueError(
                f"factors: expected {name} {expected:g}, as in the model, got {given:g}"
            )
    for tier in tiers if base is not None else ():
        layers.check_heads(base, tier)


def check_windows(base: nn.Module, tiers: Tiers) -> None:
    """Refuse tiers that no layer of a model would ever see."""
    if all(stays_as_loaded(layer, tiers.limits[0]) for layer in attention_layers(base)):
        raise ValueError(
            "model: expected a layer that sees beyond the first tier, "
            f"{tiers.limits[0]} tokens, but every layer has a sliding window within it; to extend "
            f"it, load the model with {without_windows(base.config)}"
        )
