"""Tiers: rescale factors by the position of each token, from the model as loaded outwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from longrope._validation import positive
from longrope.factors import files
from longrope.factors.heads import span
from longrope.factors.rescale import RescaleFactors


class Tiers(Sequence[RescaleFactors]):
    """An immutable sequence of rescale factors with growing `target_length`.

    The token at position `p` takes the first tier with `p < target_length`, and the last beyond
    all of them: it attends every earlier token under that tier, its query and all keys turned by
    the tier's factors. Its hidden states then depend on the tokens before it alone, whatever the
    sequence grows to. By convention the first tier is the model as loaded
    (`rope_settings(model).loaded`), so that its window computes what it always did.

    Parameters
    ----------
    tiers
        `RescaleFactors` in any order, with different target lengths, and the same `rope_theta`
        and `rotary_dim`.

    Raises
    ------
    ValueError
        In one sentence, where there are none, two have one target length, or they differ in
        `rope_theta` or `rotary_dim`.
    TypeError
        Where an element is something else.
    """

    def __init__(self, tiers: Iterable[RescaleFactors]):
        given = [tiers] if isinstance(tiers, RescaleFactors) else list(tiers)
        for tier in given:
            if not isinstance(tier, RescaleFactors):
                raise TypeError(
                    "tiers: expected RescaleFactors, or a list of them, got an element of type "
                    f"{type(tier).__name__}"
                )
        if not given:
            raise ValueError("tiers: expected at least one RescaleFactors, got an empty list")
        given.sort(key=lambda tier: tier.target_length)
        for shorter, longer in itertools.pairwise(given):
            if shorter.target_length == longer.target_length:
                raise ValueError(
                    "tiers: expected different target_length, "
                    f"got two of {longer.target_length} tokens"
                )
            for name in ("rope_theta", "rotary_dim"):
                first, other = getattr(shorter, name), getattr(longer, name)
                if first != other:
                    raise ValueError(
                        f"tiers: expected one {name} in all of them, got {first:g} and {other:g}"
                    )
        self._tiers = tuple(given)

    @overload
    def __getitem__(self, index: int) -> RescaleFactors: ...
    @overload
    def __getitem__(self, index: slice) -> Tiers: ...

    def __getitem__(self, index):
        found = self._tiers[index]
        return Tiers(found) if isinstance(index, slice) else found

    def __len__(self) -> int:
        return len(self._tiers)

    def __iter__(self) -> Iterator[RescaleFactors]:
        return iter(self._tiers)

    def __eq__(self, other: object) -> bool:
        return self._tiers == other._tiers if isinstance(other, Tiers) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._tiers)

    def __repr__(self) -> str:
        rows = [("positions", "lambda", "attention factor", "start tokens")]
        start = 0
        for number, tier in enumerate(self._tiers):
            last = number == len(self._tiers) - 1
            end = "" if last else f"{tier.target_length - 1}"
            lambdas, factor = span(tier.lambdas), span(tier.attention_factor)
            rows.append((f"{start}-{end}", lambdas, factor, str(tier.start_tokens)))
            start = tier.target_length
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        return "\n".join([f"Tiers({len(self)})", *(line.rstrip() for line in lines)])

    @property
    def limits(self) -> tuple[int, ...]:
        """The `target_length` of every tier, in tokens: the first position beyond it."""
        return tuple(tier.target_length for tier in self._tiers)

    def save(self, path: str | Path) -> None:
        """Write the tiers to a JSON file (format "longrope-tiers"), whole or not at all.

        Raises as `RescaleFactors.save` does.
        """
        fields = [files.with_shared(tier) for tier in self._tiers]
        files.write_json(Path(path), files.TIERS, {"tiers": fields})

    @classmethod
    def load(cls, path: str | Path, **settings) -> Tiers:
        """Read a file written by `save`; a file of one set of factors gives one tier.

        Parameters
        ----------
        path
            JSON, or a CSV file of the official LongRoPE code.
        **settings
            For CSV, which holds the factors alone, as for `RescaleFactors.load`.

        Raises
        ------
        FileNotFoundError, ValueError
            With one sentence that names the file and what is wrong with it.
        """
        content = files.read(Path(path))
        if not isinstance(content[0], dict):
            return cls([RescaleFactors.load(path, **settings)])
        if settings:
            raise ValueError(
                f"{next(iter(settings))}: expected no settings beside {path}, a JSON file that "
                "states them itself"
            )
        tiers = [RescaleFactors.of_fields(path, fields) for fields in content]
        try:
            return cls(tiers)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def ladder_targets(start: int, target: int, step: float = 2.0) -> list[int]:
    """Return where the tiers of a ladder from a window of `start` tokens end; the last `target`."""
    ends = [start]
    for number in itertools.count(1):
        end = round(start * step**number)
        if end >= target:
            return [*ends[1:], target]
        if end > ends[-1]:  # else a step of less than a token
            ends.append(end)


def ranges_of(window: int, target: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges of positions of a ladder: the window, then up to twice that, and so on."""
    return tuple(itertools.pairwise([0, window, *ladder_targets(window, target)]))


def ladder(factors: RescaleFactors, step: float, loaded: RescaleFactors | None) -> Tiers:
    """Return the tiers of `RescaleFactors.ladder`."""
    step = positive("step", step, above=1)
    if loaded is None:
        loaded = RescaleFactors.none(
            original_length=factors.original_length,
            rope_theta=factors.rope_theta,
            rotary_dim=factors.rotary_dim,
        )
    for name, tier in (("lambdas", factors), ("loaded", loaded)):
        if not np.isfinite(tier.lambdas).all():
            raise ValueError(f"{name}: expected finite values for a ladder, got an infinite one")
    if factors.target_length <= loaded.target_length:
        raise ValueError(
            "target_length: expected more than the window of the model as loaded, "
            f"{loaded.target_length}, got {factors.target_length}"
        )
    whole = math.log(factors.target_length / loaded.target_length)
    between = []
    for target in ladder_targets(loaded.target_length, factors.target_length, step)[:-1]:
        share = math.log(target / loaded.target_length) / whole
        between.append(
            factors.replace(
                lambdas=loaded.lambdas ** (1 - share) * factors.lambdas**share,
                attention_factor=loaded.attention_factor ** (1 - share)
                * factors.attention_factor**share,
                target_length=target,
            )
        )
    return Tiers([loaded, *between, factors])
