"""Rescale factors: how much each rotary dimension slows down, and for which lengths."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from longrope._numbers import to_json
from longrope._validation import even, integer, lambda_array, positive

if TYPE_CHECKING:
    from longrope.factors.tiers import Tiers
from longrope.factors import files, official
from longrope.factors.baselines import Baselines
from longrope.factors.heads import PerHead, Shared, attention_factors
from longrope.factors.rules import base_inv_freq


@dataclass(frozen=True, eq=False)
class RescaleFactors(PerHead, Baselines):
    """Rescaled rotary frequencies `1 / (lambda_i * theta^(2i/R))` and what they are made for.

    LongRoPE (arXiv 2402.13753, section 3): position `n` turns pair `i` by
    `n / (lambda_i * theta^(2i/R))`, except that positions below `start_tokens` keep the original
    frequency `1 / theta^(2i/R)`. The object is immutable and hashable; `replace` makes variants.

    Parameters
    ----------
    lambdas
        `[R/2]` positive factors, fastest dimension first. A factor above 1 slows its dimension
        down, and an infinite one stops it (`inv_freq` 0). They need be neither monotone nor at
        least 1: that binds the search, and some of the published sets break the order. Or
        `[L, Hk, R/2]`: those of every attention layer and key/value head, whose query heads turn as
        it does; `[L, 1, R/2]` those of every layer.
    start_tokens
        The paper's n-hat, in tokens: absolute positions below it are not rescaled.
    attention_factor
        Multiplies cos and sin of every position, so attention logits by its square. With lambdas by
        layer and head `[L, Hk]`, or one number for all.
    original_length, target_length
        Context length in tokens before and after the extension.
    rope_theta
        Base of the original frequencies.
    rotary_dim
        `R`, the number of rotated channels of a head. Even.
    shared
        Beside lambdas by layer and head the set for all of them that their search began with
        (`longrope.factors.Shared`), for readers that know one set: see `one_set`. It takes no part
        in comparisons, and `replace` drops it.

    Raises
    ------
    ValueError
        In one sentence that names the argument, what was expected and what came.
    """

    lambdas: np.ndarray
    start_tokens: int = 0
    attention_factor: float | np.ndarray = 1.0
    original_length: int = 4096
    target_length: int = 32768
    rope_theta: float = 10000.0
    rotary_dim: int = 128
    shared: Shared | None = field(default=None, repr=False)

    def __post_init__(self):
        checked = {
            "start_tokens": integer("start_tokens", self.start_tokens, 0),
            "original_length": integer("original_length", self.original_length, 1),
            "target_length": integer("target_length", self.target_length, 1),
            "rope_theta": positive("rope_theta", self.rope_theta, above=1),
            "rotary_dim": even("rotary_dim", self.rotary_dim),
        }
        checked["lambdas"] = lambdas = lambda_array(self.lambdas, checked["rotary_dim"])
        heads = lambdas.shape[:2] if lambdas.ndim > 1 else None
        checked["attention_factor"] = attention_factors(self.attention_factor, heads)
        if self.shared is not None:
            self._check_shared(heads, checked)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the way into a frozen dataclass

    def _check_shared(self, heads: tuple[int, ...] | None, checked: dict) -> None:
        if not isinstance(self.shared, Shared):
            raise ValueError(f"shared: expected a Shared or None, got {type(self.shared).__name__}")
        if heads is None:
            raise ValueError("shared: expected None beside lambdas for all layers and heads alike")
        for name in ("original_length", "target_length", "rope_theta", "rotary_dim"):
            found = getattr(self.shared.factors, name)
            if found != checked[name]:
                raise ValueError(f"shared: expected {name} {checked[name]}, got {found}")

    # --- what they are --------------------------------------------------------------------------

    @property
    def ratio(self) -> float:
        """`target_length / original_length`, the paper's `s`."""
        return self.target_length / self.original_length

    def base_inv_freq(self) -> np.ndarray:
        """Return the original frequencies `theta^(-2i/R)`, radians per token, float64 `[R/2]`."""
        return base_inv_freq(self.rope_theta, self.rotary_dim)

    def inv_freq(self) -> np.ndarray:
        """Return the rescaled frequencies, radians per token, float64 in the shape of lambdas."""
        return self.base_inv_freq() / self.lambdas

    def replace(self, **changes) -> RescaleFactors:
        """Return a copy with some fields changed, validated again.

        `shared` stands beside the numbers as they were found: it is dropped unless it is given.
        """
        return dataclasses.replace(self, **{"shared": None} | changes)

    def __mul__(self, other: RescaleFactors) -> RescaleFactors:
        """Compose two stages: `f * g` extends by `f`, then by `g` (paper, section 3.3).

        Lambdas, ratios and attention factors multiply. The original length is that of `f`, the
        start tokens are those of `g`. The lengths need not meet: a target that the ratios put
        between two whole tokens is rounded. The stages must have the same `rope_theta` and
        `rotary_dim`. Where both know a set for all layers and heads, so does the product.
        """
        if not isinstance(other, RescaleFactors):
            return NotImplemented
        for name in ("rope_theta", "rotary_dim"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"{name}: expected the same value in both factors of a product, "
                    f"got {ours} and {theirs}"
                )
        one, two = self, other
        if self.per_head and other.per_head:
            heads = tuple(map(max, self.heads, other.heads))
            one, two = self.spread(*heads), other.spread(*heads)  # refuse others
        # Whole numbers of any size divide exactly here; floats would round beyond 2^53.
        product, original = self.target_length * other.target_length, other.original_length
        return self.replace(
            lambdas=one.lambdas * two.lambdas,
            start_tokens=other.start_tokens,
            attention_factor=one.attention_factor * two.attention_factor,
            target_length=max(1, (2 * product + original) // (2 * original)),
            shared=self._shared_times(other),
        )

    def _key(self) -> tuple:
        values = (getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "shared")
        return tuple((v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, RescaleFactors) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self):
        # Through the constructor: an array that numpy unpickles itself would be writable.
        fields = dataclasses.fields(self)
        return type(self), tuple(getattr(self, field.name) for field in fields)

    def ladder(self, step: float = 2.0, loaded: RescaleFactors | None = None) -> Tiers:
        """Return tiers by position that lead from the model as loaded to these factors.

        Between the window of the model as loaded, `s0` times the original one, and the target, `s`
        times it, there is a tier for the ratios `s0 step, s0 step^2, ...`. That of ratio `r` has
        the lambdas and the attention factor on the way, geometrically: with
        `w = ln(r / s0) / ln(s / s0)`, `lambda = lambda_loaded^(1 - w) * lambda_f^w`. The start
        tokens are those of `f`; the first tier is the model as loaded, the last is `f` itself.

        Parameters
        ----------
        step
            Ratio of the targets of neighbours, above 1. Measured (docs/tiers.md): steps of 2 are
            enough, smaller ones gain nothing.
        loaded
            The model as loaded (`rope_settings(model).loaded`); None: a model without a rope
            scaling of its own, with a window of `original_length`.

        Raises
        ------
        ValueError
            Where a lambda is infinite, `step` is not above 1, or the target does not lie beyond
            the window of the model as loaded.
        """
        from longrope.factors.tiers import ladder  # tiers are made of factors

        return ladder(self, step, loaded)

    # --- files ----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the factors to a JSON file, which `load` reads back to the bit.

        The file appears whole or not at all: an interrupted write leaves what was there before.
        Raises `OSError` with one sentence where the file cannot be written, and `ValueError` for a
        name that says CSV.
        """
        files.write_json(Path(path), files.FACTORS, files.with_shared(self))

    def as_fields(self) -> dict:
        """Return the fields as plain numbers and lists, as files hold them; without `shared`.

        An infinite lambda, which JSON has no number for, is "inf".
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["shared"]
        if self.per_head:
            fields["attention_factor"] = self.attention_factor.tolist()

        return fields | {"lambdas": to_json(self.lambdas.tolist())}

    @classmethod
    def load(cls, path: str | Path, **settings) -> RescaleFactors:
        """Read a file written by `save`, or a CSV file of the official LongRoPE code.

        Parameters
        ----------
        path
            JSON (told by its content, not by its name), or CSV: one number a line, or one line for
            each layer, which must all be equal. The `R/2` factors may follow the number of start
            tokens (`dim_mono_n`) or two indices of pairs (`dim_piece_mono`), which are dropped.
            Which it is follows from `rotary_dim`, or where it is left out from the values: the
            number of factors is taken to be a multiple of 8 where that is possible.
        **settings
            For CSV, which holds the factors alone: any field of this class except `lambdas`. Left
            out, `rotary_dim` is twice the number of factors, and the others take the defaults of
            the class: start_tokens 0, attention_factor 1.0, original_length 4096, target_length
            32768, rope_theta 10000.0. `attention_factor` may be `"su"`, what the authors of these
            files use with them, or `"yarn"`: computed from the lengths. Left out, a warning says
            that it is 1.0. Refused for JSON, which states them itself.

        Raises
        ------
        FileNotFoundError, ValueError
            With one sentence that names the file and what is wrong with it.
        """
        content = files.read(Path(path))
        try:
            if not isinstance(content[0], dict):
                if "attention_factor" not in settings:
                    warnings.warn(
                        f"{path}: the file states no attention factor, 1.0 is taken; its authors "
                        'use attention_factor="su"', stacklevel=2,
                    )  # fmt: skip
                defaults = {f.name: f.default for f in dataclasses.fields(cls)}
                return cls(**official.fields_of(content, settings, defaults))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if settings:
            raise ValueError(
                f"{next(iter(settings))}: expected no settings beside {path}, "
                "a JSON file that states them itself; change them with .replace()"
            )
        if len(content) > 1:
            raise ValueError(
                f"{path}: expected one set of factors, got {len(content)} tiers (Tiers.load)"
            )
        return cls.of_fields(path, content[0])

    @classmethod
    def of_fields(cls, path: str | Path, fields: dict) -> RescaleFactors:
        """Return the factors whose fields a JSON file holds; `path` is what an error names."""
        try:
            shared = fields.get("shared")
            if shared is not None:
                shared = Shared(**shared | {"factors": cls(**shared["factors"])})
            return cls(**fields | {"shared": shared})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
