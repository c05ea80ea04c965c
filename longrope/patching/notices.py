"""What is said, once, where factors may not do what their user expects of them."""

from __future__ import annotations

from typing import Any

from longrope._warnings import warn
from longrope.factors import Tiers
from longrope.patching.families import attention_layers, decoder, family_of, window_of
from longrope.patching.settings import rope_settings

#: Rope types that factors replace without a word: none at all, or an earlier LongRoPE export.
_REPLACED_SILENTLY = ("default", "longrope")


def farthest(model: Any) -> int | None:
    """Return how many tokens, itself included, the farthest-seeing layer with RoPE attends to.

    None where one sees all tokens before it, as in models that mix sliding and full attention, and
    where the model is not one that `longrope.apply` takes.
    """
    try:
        layers = attention_layers(decoder(model))
    except (AttributeError, TypeError, ValueError):
        return None
    windows = [window_of(layer) for layer in layers if getattr(layer, "use_rope", True)]
    return None if not windows or None in windows else max(windows)


def without_windows(config: Any) -> str:
    """Return what a model is to be loaded with so that no layer slides, as keyword arguments.

    Layers of named types ask for the window's size as long as they are sliding ones.
    """
    if getattr(config, "layer_types", None):
        return f'layer_types=["full_attention"] * {config.num_hidden_layers}'
    return "sliding_window=None"


def window_notice(model: Any, length: int) -> str | None:
    """Return the sentence for a model whose layers all see less than `length` tokens, or None."""
    reach = farthest(model)
    if reach is None or reach >= length:
        return None
    fields = without_windows(decoder(model).config)
    return (
        f"every layer of the model has a sliding window, of at most {reach} tokens: among {length} "
        f"tokens no distance beyond that occurs, whatever the factors; to extend it, load the "
        f"model with {fields} and count from original_length={reach}"
    )


def warn_of_window(model: Any, length: int) -> None:
    """Warn where every layer of a model has a sliding window shorter than `length` tokens."""
    notice = window_notice(model, length)
    if notice is not None:
        warn(notice)


def warn_of_untested(model: Any) -> None:
    """Warn of a model whose family no test holds; `longrope.apply` has tried it."""
    family = family_of(decoder(model))
    if not family.tested:
        warn(
            f'the model type "{family.name}" is in none of the families that longrope is tested '
            "with: a tiny random model of its class has passed the same trial"
            + ("" if family.tiers else ', but for tiers by position, which only tiers="row" gives')
        )


def warn_of_factors(model: Any, tiers: Tiers, *, as_loaded: bool) -> None:
    """Warn of what keeps tiers from doing what they were made for in a model, each cause once.

    A scaling of its own, which they replace (`as_loaded`: the first of them is the model with it);
    a window other than the one they count from; sliding windows shorter than their target.
    """
    warn_of_untested(model)
    settings, original = rope_settings(model), tiers[0].original_length
    if settings.rope_type not in _REPLACED_SILENTLY and not as_loaded:
        warn(
            f'the model\'s own rope scaling "{settings.rope_type}" is switched off while rescale '
            "factors are applied: they count from its unscaled frequencies"
        )
    # Where every layer slides, no distance beyond the window was ever seen in training.
    if original not in (settings.original_length, farthest(model)):
        warn(
            f"the factors count from an original length of {original} tokens, and the model's "
            f"configuration says {settings.original_length}: were they made for this model?"
        )
    if tiers[-1].target_length > original:
        warn_of_window(model, tiers[-1].target_length)
