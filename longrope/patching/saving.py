"""A word when a model with factors is saved without them."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from longrope.patching.families import decoder

#: Whether the factors are written by somebody else, here `longrope.export`.
_EXPORTING: ContextVar[bool] = ContextVar("exporting", default=False)


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Save models inside the block without the warning."""
    token = _EXPORTING.set(True)
    try:
        yield
    finally:
        _EXPORTING.reset(token)


@functools.cache
def warn_on_save() -> None:
    """Make `save_pretrained` of transformers say that applied factors stay behind.

    On the class, not on a model: copies and pickles of a model hold no function of ours.
    """
    from transformers import PreTrainedModel

    own = PreTrainedModel.save_pretrained

    @functools.wraps(own)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _EXPORTING.get() and _has_factors(self):
            warnings.warn(
                "save_pretrained writes the model without the rescale factors that are applied to "
                "it; longrope.export writes a folder that holds them",
                stacklevel=2,
            )
        return own(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained


def _has_factors(model: Any) -> bool:
    try:
        rotary = decoder(model).rotary_emb
    except (AttributeError, TypeError, ValueError):
        return False
    return type(rotary).__module__.startswith("longrope.")
