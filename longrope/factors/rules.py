"""The formulas of the baselines and of the attention factors."""

from __future__ import annotations

import math

import numpy as np

#: The paper's YaRN settings, and transformers': dimensions that turn more than 32 times in the
#: original window keep their frequency, those that turn less than once are interpolated.
YARN_BETA_FAST, YARN_BETA_SLOW = 32, 1
#: Llama 3.1's `low_freq_factor` and `high_freq_factor`: turns in the original window.
LLAMA3_TURNS = 1.0, 4.0


def su_attention_factor(ratio: float, original_length: int) -> float:
    """Return `sqrt(1 + ln s / ln L0)`, the attention factor of LongRoPE's code and of Phi-3.

    `ratio` is `s = target_length / original_length`, `original_length` is `L0` in tokens. 1.0 where
    `ratio <= 1`. transformers' rope type `"longrope"` uses the same formula by default.
    """
    if ratio <= 1:
        return 1.0
    if original_length < 2:
        raise ValueError(f"original_length: expected at least 2 tokens, got {original_length}")
    return math.sqrt(1 + math.log(ratio) / math.log(original_length))


def yarn_attention_factor(ratio: float) -> float:
    """Return `0.1 ln s + 1`, the attention factor of YaRN (arXiv 2309.00071, section 3.4).

    `ratio` is `s = target_length / original_length`; 1.0 where `ratio <= 1`.
    """
    return 0.1 * math.log(ratio) + 1.0 if ratio > 1 else 1.0


def base_inv_freq(rope_theta: float, rotary_dim: int) -> np.ndarray:
    """Return the original frequencies `theta^(-2i/R)`, radians per token, float64 `[R/2]`."""
    return rope_theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)


def pair_that_turns(
    turns: float, original_length: int, rope_theta: float, rotary_dim: int
) -> float:
    """Return the pair that turns `turns` times in the original window: `i`, fractional.

    `R/2 log_theta(L0 / (2 pi turns))`, counted from 0 and not limited to the pairs there are.
    """
    wavelength = original_length / (turns * 2 * math.pi)
    return rotary_dim * math.log(wavelength) / (2 * math.log(rope_theta))


def ntk_lambdas(ratio: float, rotary_dim: int) -> np.ndarray:
    """Return `s^(2i/(R-2))`, `[R/2]`."""
    # A single pair (R = 2) has no room for a ramp and stays as it is.
    return ratio ** (np.arange(0, rotary_dim, 2) / max(rotary_dim - 2, 1))


def yarn_band(
    original_length: int, rope_theta: float, rotary_dim: int, truncate: bool = True
) -> tuple[float, float]:
    """Return the pairs between which YaRN's ramp rises: that of 32 turns and that of one turn.

    `truncate` rounds them outwards. The clamps, the upper one to `R - 1` rather than `R/2 - 1`
    included, are transformers'.
    """
    rope = (original_length, rope_theta, rotary_dim)
    low, high = pair_that_turns(YARN_BETA_FAST, *rope), pair_that_turns(YARN_BETA_SLOW, *rope)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    return low, high + (0.001 if low == high else 0)


def yarn_lambdas(
    ratio: float, original_length: int, rope_theta: float, rotary_dim: int, truncate: bool
) -> np.ndarray:
    """Return `1 / (ramp_i / s + 1 - ramp_i)`, `[R/2]`; the ramp is `RescaleFactors.yarn`'s."""
    low, high = yarn_band(original_length, rope_theta, rotary_dim, truncate)
    ramp = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0, 1)
    return 1 / (ramp / ratio + 1 - ramp)


def mrrope_lambdas(
    ratio: float, original_length: int, rope_theta: float, rotary_dim: int, progressive: bool
) -> np.ndarray:
    """Return `s^(t/n)`, or `s^(t(t+1) / (n(n+1)))`, `[R/2]`; `t` counts from YaRN's first pair."""
    low, high = yarn_band(original_length, rope_theta, rotary_dim)
    n = high - low
    t = np.clip(np.arange(rotary_dim // 2) - low, 0, n)
    return ratio ** (t * (t + 1) / (n * (n + 1)) if progressive else t / n)


def llama3_lambdas(
    ratio: float,
    original_length: int,
    rope_theta: float,
    rotary_dim: int,
    low_turns: float,
    high_turns: float,
) -> np.ndarray:
    """Return `1 / (smooth + (1 - smooth) / s)`, `[R/2]`; `smooth` is linear in a pair's turns."""
    turns = original_length * base_inv_freq(rope_theta, rotary_dim) / (2 * math.pi)
    smooth = np.clip((turns - low_turns) / (high_turns - low_turns), 0, 1)
    return 1 / (smooth + (1 - smooth) / ratio)


def closed_forms(
    ratio: float, original_length: int, rope_theta: float, rotary_dim: int
) -> dict[str, np.ndarray]:
    """Return the lambdas of every rule that needs no search, by name, `[R/2]` each.

    Those of `longrope.factors.baselines.BASELINES`, for any ratio: also one that leads to no whole
    number of tokens, as on top of another scaling.
    """
    rope = (original_length, rope_theta, rotary_dim)
    ones = np.ones(rotary_dim // 2)
    return {
        "pi": ratio * ones,
        "ntk": ntk_lambdas(ratio, rotary_dim),
        "yarn": yarn_lambdas(ratio, *rope, truncate=True),
        "dynamic-ntk": ntk_lambdas(dynamic_ntk_ratio(ratio, ratio), rotary_dim),
        "llama3": llama3_lambdas(ratio, *rope, *LLAMA3_TURNS),
        "mrrope-uni": mrrope_lambdas(ratio, *rope, progressive=False),
        "mrrope-pro": mrrope_lambdas(ratio, *rope, progressive=True),
        "cope": cope_lambdas(ones, base_inv_freq(rope_theta, rotary_dim), original_length, None),
    }


def dynamic_ntk_ratio(ratio: float, factor: float) -> float:
    """Return the ratio at which dynamic scaling is NTK's, `factor * s - (factor - 1)`."""
    return factor * ratio - (factor - 1)


def cope_lambdas(
    lambdas: np.ndarray, inv_freq: np.ndarray, original_length: int, pairs: int | None
) -> np.ndarray:
    """Return lambdas over `(1 + cos(linspace(0, pi, n))) / 2` for the `n` slowest pairs.

    In the shape of `lambdas`, `[R/2]` or `[L, Hk, R/2]`. `inv_freq` are the unrescaled frequencies,
    which say the pairs where `pairs` is None.
    """
    if pairs is None:
        pairs = int(np.count_nonzero(2 * math.pi > original_length * inv_freq))
    taper = np.ones_like(lambdas)
    taper[..., lambdas.shape[-1] - pairs :] = (1 + np.cos(np.linspace(0, math.pi, pairs))) / 2
    with np.errstate(divide="ignore"):
        return lambdas / taper
