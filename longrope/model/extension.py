"""The tiers of a `LongRoPEModel`: `extend_context` and `recover_short_context`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope import _validation
from longrope.documents import as_documents, long_enough
from longrope.documents.checks import like
from longrope.evaluation.perplexity import perplexity
from longrope.factor_search.options import METHODS
from longrope.factor_search.run import search
from longrope.factors import RescaleFactors, Tiers
from longrope.patching import apply, remove

if TYPE_CHECKING:
    from longrope.factor_search.history import SearchResult
    from longrope.model.standalone import LongRoPEModel

#: Documents whose first windows decide between a searched tier and the one on the way.
_COMPARED = 8
#: `stacklevel` of warnings: the line that calls the model's method.
_CALLER = 3


def tiers_for(
    model: LongRoPEModel, data: Any, target_length: int, method: str | None, options: dict[str, Any]
) -> Tiers:
    """Return the tiers of `LongRoPEModel.extend_context`."""
    target_length = _validation.integer("target_length", target_length, 1)
    if target_length <= model.base_length:
        raise ValueError(
            f"target_length: expected more than base_length, {model.base_length}, "
            f"got {target_length}"
        )
    if method is not None:
        _validation.choice("method", method, (*METHODS, "yarn"))
    _check_per(options)
    if method == "yarn" and options:
        raise ValueError(
            f"{next(iter(options))}: expected no options of a search with method='yarn'"
        )
    if method is None and not model.trained:
        if data is not None:
            _checked(model, data)
        warnings.warn(
            "extend_context: the model has random weights, by which no factors can be searched: "
            'taking YaRN\'s (fit first, or method="yarn" to take them in any case)',
            stacklevel=_CALLER,
        )
        method = "yarn"
    if method == "yarn":
        factors = RescaleFactors.yarn(**model.rope.lengths(target_length))
    else:
        documents = _long_documents(model, data, target_length)
        found = _search(model, documents, target_length, options | {"method": method})
        if found.tiers is not None:
            return found.tiers
        factors = found.factors
    return factors.ladder(loaded=model.rope.loaded)


def recovered(
    model: LongRoPEModel, data: Any, lengths: Sequence[int] | None, options: dict[str, Any]
) -> Tiers:
    """Return the tiers of `LongRoPEModel.recover_short_context`."""
    base, target = model.base_length, model.context_length
    if len(model.tiers) < 2:
        raise ValueError(
            "model: expected tiers by position (extend_context first), got a single one"
        )
    _check_per(options)
    if lengths is None:
        lengths = [2 * base] if 2 * base < target else []
    if isinstance(lengths, (str, bytes)) or not isinstance(lengths, Iterable):
        raise ValueError(f"lengths: expected numbers of tokens, got {lengths!r}")
    lengths = list(lengths)
    for length in lengths:
        if not base < _validation.integer("lengths", length, 1) < target:
            raise ValueError(
                f"lengths: expected lengths above base_length, {base}, and below the extended "
                f"window, {target}, got {length}"
            )
    if not model.trained:
        _checked(model, data)
        warnings.warn(
            "recover_short_context: the model has random weights (fit first): its tiers stay",
            stacklevel=_CALLER,
        )
        return model.tiers
    tiers = model.tiers
    for length in sorted(lengths):
        documents = _long_documents(model, data, length)
        out = options.get("out")
        run = options if out is None else options | {"out": Path(out) / str(length)}
        found = _search(model, documents, length, run).factors
        others = [tier for tier in tiers if tier.target_length != length]
        begin = max(tier.target_length for tier in others if tier.target_length < length)
        with_it = Tiers([*others, found])
        now, then = (
            _perplexity(model, candidate, documents, begin, length)
            for candidate in (tiers, with_it)
        )
        tiers = with_it if then < now else tiers
    return tiers


def _check_per(options: dict[str, Any]) -> None:
    """Refuse factors by layer or head, which the model's own forward pass cannot turn by."""
    if options.get("per", "model") != "model":
        raise ValueError(
            "per: expected 'model', the factors that LongRoPEModel runs with, got "
            f"{options['per']!r}; longrope.search on its `llama` finds the others"
        )


def _checked(model: LongRoPEModel, data: Any, least: int = 1) -> list[Any]:
    vocabulary = model.llama.config.vocab_size
    return as_documents(data, min_length=least, vocab_size=vocabulary, name="data")


def _long_documents(model: LongRoPEModel, data: Any, length: int) -> list[Any]:
    """Return the documents of at least `length` tokens, as a list of the kind they came in."""
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        data = like(data, list(data)) if hasattr(data, "bos") else list(data)
    _checked(model, data, 0)
    return long_enough(data, length, "data")


def _search(
    model: LongRoPEModel, documents: list[Any], length: int, options: dict[str, Any]
) -> SearchResult:
    """Search on the model before any extension; its tiers are in force again afterwards."""
    options = {name: value for name, value in options.items() if value is not None}
    remove(model.llama)
    try:
        return search(model.llama, documents, target_length=length, **options)
    finally:
        model.set_tiers(model.tiers)


def _perplexity(
    model: LongRoPEModel, tiers: Tiers, documents: list[Any], begin: int, end: int
) -> float:
    """Return the perplexity of positions `begin` to before `end` under tiers."""
    apply(model.llama, tiers)
    documents = like(documents, [document[:end] for document in documents[:_COMPARED]])
    try:
        found = perplexity(model.llama, documents, length=end, stride=end, ranges=[(begin, end)])
    finally:
        model.set_tiers(model.tiers)
    return found.by_range[0]
