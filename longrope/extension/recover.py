"""`longrope.recover`: tiers for short texts, by search alone (LongRoPE, section 3.4)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longrope import report
from longrope._validation import integer, switch
from longrope.documents import as_documents
from longrope.errors import NotFiniteError
from longrope.evaluation.identity import digests
from longrope.evaluation.modes import vocabulary
from longrope.evaluation.perplexity import perplexity
from longrope.evaluation.start import bos_token
from longrope.extension.config import RecoverOptions
from longrope.extension.folder import weights_hash
from longrope.extension.short_search import ShortSearch, open_journal
from longrope.factors import RescaleFactors, Tiers
from longrope.patching import apply, remove
from longrope.patching.apply import check_windows, factors_kept, rotary_of
from longrope.patching.attention import check_tiered_attention
from longrope.patching.families import decoder
from longrope.patching.wrappers import dtype_note
from longrope.report.recovery import TABLE, TIERS
from longrope.runs.folder import write_text
from longrope.runs.options import about, from_keywords


@dataclass(frozen=True, kw_only=True)
class RecoverArguments(RecoverOptions):
    """The keyword arguments of `recover`."""

    lengths: Sequence[int] = ()
    original: nn.Module | None = None
    test: Iterable[Any] | None = None
    out: str | Path | None = None
    resume: bool = field(default=True, metadata=about(switch))


@dataclass(frozen=True)
class RecoverResult:
    """What `longrope.recover` found.

    Attributes
    ----------
    tiers
        Tiers by position: the recovered ones, then those that the model had beyond them.
    by_length
        The set that was found for windows of each length, the paper's recovery:
        `apply(model, [*by_length, long], tiers="row")`.
    lengths
        In tokens.
    perplexities
        For each length, by the names of the ways to run the model: of windows of that length.
    weights
        The hash of the weights, the same before and after.
    """

    tiers: Tiers
    by_length: tuple[RescaleFactors, ...]
    lengths: tuple[int, ...]
    perplexities: dict[str, tuple[float, ...]]
    weights: str

    def table(self) -> str:
        """Return a Markdown table, a row for each way to run the model, a column a length."""
        head = ["perplexity of windows of", *map(str, self.lengths)]
        lines = [head, ["---", *["---:"] * len(self.lengths)]]
        lines += [[name, *(f"{v:.3f}" for v in row)] for name, row in self.perplexities.items()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@torch.inference_mode(False)
@from_keywords(RecoverArguments)
def recover(model: nn.Module, documents: Iterable[Any], options: RecoverArguments) -> RecoverResult:
    """Search tiers of rescale factors for short texts on a model that was extended.

    An extended model loses on short texts: its factors crowd their positions. As in LongRoPE, one
    more search at each of `lengths` finds factors for them, with a smaller upper bound, and weights
    stay as they are. Each search begins with the model as loaded, powers of the long set and the
    tier that the model has, and descends from the best. That is the paper's recovery, by the length
    of a row. For tiers by position, another search goes on from it for each range of positions
    alone, behind the tiers below, from the shortest on. Held-out windows decide for each range
    between what was found either way, the tiers that the model has, and the model as loaded.

    Parameters
    ----------
    model
        A model with factors applied (`longrope.apply`), which are the long ones. Left as it is:
        pass `result.tiers` to `longrope.apply`.
    documents
        1-D token ids, each at least as long as the longest of `lengths`.
    lengths
        The ends of the tiers, in tokens, growing and below the long factors' target length: the
        original window and twice that, in the paper.
    steps, samples, seed
        Steps of the descent, search windows of each length, and the seed of windows.
    max_lambda
        Upper bound of lambda; None: the largest of the long set.
    bos
        What stands in front of every window, as for `longrope.search`.
    original
        The model before it was extended, to judge by, where weights were trained; None: `model`
        without factors.
    test
        Documents to judge on, which no search sees; None: the held-out windows of the searches.
    out
        Run directory: a journal from which a killed search resumes to the bit, `tiers.json`,
        `recovery.md` and `report.html`.
    resume
        False: start again.

    Returns
    -------
    RecoverResult

    Raises
    ------
    ValueError
        In one sentence: no factors applied, lengths that do not grow or reach beyond the factors,
        too short documents, the journal of another search.
    """
    lengths = _checked_lengths(options.lengths)
    before = rotary_of(model)
    had = Tiers(before.tiers)
    if lengths[-1] >= had[-1].target_length:
        raise ValueError(
            f"lengths: expected less than the target length of the factors, "
            f"{had[-1].target_length}, got {lengths[-1]}"
        )
    check_recoverable(model, had, lengths)
    vocab_size = vocabulary(model)
    bos = bos_token(options.bos, model, documents)
    texts = as_documents(documents, min_length=lengths[-1], vocab_size=vocab_size)
    test = None
    if options.test is not None:
        test = as_documents(
            options.test, min_length=lengths[-1], vocab_size=vocab_size, name="test"
        )
    hashed = weights_hash(model)
    how = {
        k: v for k, v in vars(options).items() if k in ("steps", "samples", "max_lambda", "seed")
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(factors_kept(model))
        journal = None
        if options.out is not None:
            other = options.original
            header = {
                "lengths": lengths, "weights": hashed, "bos": bos, **how,
                "original": None if other is None else weights_hash(other),
                "test": None if test is None else digests(test),
                "tiers": [tier.as_fields() for tier in had],
            }  # fmt: skip
            path = Path(options.out)
            results = (TIERS, TABLE)
            journal = stack.enter_context(
                open_journal(path, header, dtype_note(model), texts, results, options.resume)
            )
        search = ShortSearch(model, texts, had, bos, journal=journal, **how)
        by_length, tiers = [], []
        for length in lengths:
            begin = tiers[-1].target_length if tiers else 0
            found = search.at(length)
            by_length.append(found)
            tiers += search.better_tier(tiers, found, begin, length)
        tiers = Tiers([*tiers, *(tier for tier in had if tier.target_length > lengths[-1])])
        original = model if options.original is None else options.original
        ways = {
            "the original model": (original, lambda length: None),
            "the long set for every position": (model, lambda length: had[-1]),
            "as it was, by position": (model, lambda length: had),
            "recovered, by the length of the row (the paper)": (
                model, lambda length: by_length[lengths.index(length)],
            ),
            "recovered, by position": (model, lambda length: tiers),
        }  # fmt: skip
        perplexities = {
            name: tuple(
                search.recorded(partial(_measured, way[0], way[1](length), length, test, search))
                for length in lengths
            )
            for name, way in ways.items()
        }
        if weights_hash(model) != hashed:
            raise RuntimeError("the weights changed during a search, which must not be")
    result = RecoverResult(tiers, tuple(by_length), tuple(lengths), perplexities, hashed)
    if options.out is not None:
        tiers.save(Path(options.out) / TIERS)
        write_text(Path(options.out) / TABLE, result.table() + "\n")
        report.at_end(Path(options.out))
    return result


def check_recoverable(model: nn.Module, tiers: Tiers, lengths: Sequence[int]) -> None:
    """Raise `ValueError` where a model under some tiers cannot have others for short texts."""
    if any(tier.per_head for tier in tiers):
        raise ValueError(
            "model: expected factors for all layers and heads alike to recover the short context "
            "of, got those of each; apply one_set() of them first"
        )
    check_tiered_attention(decoder(model), "there is no recovery without them")
    check_windows(decoder(model), Tiers(tiers[-1].replace(target_length=lengths[0])))


def _checked_lengths(lengths: Any) -> list[int]:
    if isinstance(lengths, str) or not isinstance(lengths, Sequence) or not lengths:
        raise ValueError(f"lengths: expected a list of lengths, got {lengths!r}")
    found = [integer("lengths", length, 4) for length in lengths]
    if found != sorted(set(found)):
        raise ValueError(f"lengths: expected lengths that grow, got {found}")
    return found


def _measured(
    model: nn.Module, factors: Any, length: int, test: Sequence[torch.Tensor] | None,
    search: ShortSearch,
) -> float:  # fmt: skip
    """Return the perplexity of windows of a length under factors; None: the model as loaded."""
    windows = search.held_out(length) if test is None else [text[:length] for text in test]
    if factors is None:
        with factors_kept(model):
            remove(model)
            return _perplexity(model, windows, length, search.bos)
    apply(model, factors)
    try:
        return _perplexity(model, windows, length, search.bos)
    except NotFiniteError:
        return math.inf


def _perplexity(model: nn.Module, windows: Any, length: int, bos: int | None) -> float:
    bos_or_none = False if bos is None else bos
    return float(perplexity(model, windows, length=length, stride=length, bos=bos_or_none))
