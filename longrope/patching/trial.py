"""Trying a model of no known family: does what `longrope.apply` does hold for it?

A tiny random model of the same class is put through the tests that admit a family to the registry
(tests/patching/test_families.py), as far as they need no knowledge of it: factors of none equal the
plain model, factors equal the model's own rotary module at their frequencies, our attention equals
the model's, and under tiers by position neither a cut nor generation sees a crossing. It takes a
fraction of a second, once for each class and process.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from longrope.factors import RescaleFactors, Tiers
from longrope.patching.settings import ORIGINAL, rope_settings

#: The tiny model's window, the factor that the tests stretch it by, and the tokens they run.
_WINDOW, _FACTOR, _TOKENS = 16, 4, 40
#: Deviations, in shares of the largest logit: what float32 leaves, and what factors must change.
_NOISE, _BITE = 1e-3, 1e-2
#: What a configuration may say of sizes, and what it says of a tiny model.
_SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "max_position_embeddings": _WINDOW, "initializer_range": 0.2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "attention_dropout": 0.0,
}  # fmt: skip
_LAYERS = 2


class TrialError(ValueError):
    """A model that cannot be tried, or has failed; the message is a clause."""


def attention_name(base: nn.Module) -> str:
    """Return the attribute of a decoder's layers that holds their attention, or say what misses."""
    layers = getattr(base, "layers", None)
    if not layers or not hasattr(base, "rotary_emb"):
        raise TrialError("its decoder has no layers and rotary_emb")
    for name in ("self_attn", "attention"):
        if all(hasattr(layer, name) for layer in layers):
            return name
    raise TrialError("its layers have no self_attn")


def try_model(model: nn.Module) -> tuple[bool, bool]:
    """Return whether our attention, and tiers by position, work in models of the class of `model`.

    Raises `TrialError` where not even one set of factors does.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(0)
        try:
            tiny = _tiny(model)
            ids = torch.randint(1, 64, (2, _TOKENS))
            plain = _outputs(tiny, ids)
        except Exception as error:  # a configuration that wants more than we know of
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise TrialError(f"no tiny model of its class could be made ({reason})") from None
        try:
            _try_factors(tiny, ids, plain)
        except TrialError:
            raise
        except Exception as error:
            raise TrialError(f"{type(error).__name__}: {error}".split("\n")[0]) from None
        return _works(_try_attention, tiny, ids, plain), _works(_try_tiers, tiny, ids, plain)


def _tiny(model: nn.Module) -> nn.Module:
    config = copy.deepcopy(model.config)
    heads = getattr(config, "num_key_value_heads", None)
    many = heads is not None and heads < config.num_attention_heads
    small = _SMALL | {"num_hidden_layers": _LAYERS, "head_dim": 16}
    small |= {"num_key_value_heads": (1 if heads == 1 else 2) if many else 4}
    if getattr(config, "sliding_window", None) is not None:
        small["sliding_window"] = 8
    kinds = getattr(config, "layer_types", None)
    if kinds:  # one of each, a full one among them
        other = [kind for kind in dict.fromkeys(kinds) if kind != "full_attention"]
        config.layer_types = [*other, "full_attention", "full_attention"][:_LAYERS]
    _unscale(config)
    for name, value in small.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    with torch.device("cpu"):
        return type(model)(config).float().eval()


def _unscale(config: Any) -> None:
    """Take the scaling of its rotary embedding out of a configuration, in place."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:  # transformers 4
        config.rope_scaling = None
        return
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]
    for each in by_layer or [parameters]:
        if each.get("rope_type") != "proportional":  # which is no scaling, but fewer pairs
            each["rope_type"] = "default"
        if ORIGINAL in each:
            each[ORIGINAL] = _WINDOW
    if getattr(config, ORIGINAL, None) is not None:
        setattr(config, ORIGINAL, _WINDOW)


def _outputs(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **({"use_cache": False} | inputs))[0]


def _factors(model: nn.Module, lambdas: float) -> RescaleFactors:

    settings = rope_settings(model)
    none = RescaleFactors.none(**settings.lengths(_FACTOR * settings.original_length))
    return none.replace(lambdas=none.lambdas * lambdas)


def _try_factors(tiny: nn.Module, ids: Tensor, plain: Tensor) -> None:
    """One set: as loaded it changes nothing, and divided frequencies are the model's divided."""
    from longrope.patching.apply import _install, remove
    from longrope.patching.families import decoder

    loaded = rope_settings(tiny).loaded
    largest = plain.abs().max()

    def under(factors: RescaleFactors) -> Tensor:
        try:
            _install(tiny, Tiers([factors]), False, "turned")
            return _outputs(tiny, ids)
        finally:
            remove(tiny)

    if (under(loaded) - plain).abs().max() > _NOISE * largest:
        raise TrialError("the factors of the model as loaded change its outputs")
    divided = under(loaded.replace(lambdas=loaded.lambdas * _FACTOR))
    if (divided - plain).abs().max() < _BITE * largest:
        raise TrialError("factors change nothing")
    rotary = decoder(tiny).rotary_emb
    extended = [name for name, _ in rotary.named_buffers()
                if name.endswith("inv_freq") and "original" not in name
                and (name == "inv_freq" or name.startswith("full_attention"))]  # fmt: skip
    for name in extended:
        setattr(rotary, name, rotary.get_buffer(name) / _FACTOR)
    own = _outputs(tiny, ids)
    for name in extended:
        setattr(rotary, name, rotary.get_buffer(name) * _FACTOR)
    if (divided - own).abs().max() > _NOISE * largest:
        raise TrialError("factors do other than the same frequencies in its own rotary module")


def _try_attention(tiny: nn.Module, ids: Tensor, plain: Tensor) -> bool:
    from longrope.patching.attention import has_kernel_attention, kernel_attention

    with kernel_attention(tiny):
        ours = _outputs(tiny, ids)
    return has_kernel_attention(tiny) and _close(ours, plain)


def _try_tiers(tiny: nn.Module, ids: Tensor, plain: Tensor) -> bool:
    """The first window is the model's; prefills in two pieces and in one agree."""
    from longrope.patching.apply import _install, remove

    settings = rope_settings(tiny)
    ladder = _factors(tiny, _FACTOR).ladder(loaded=settings.loaded)
    try:
        _install(tiny, ladder, True, "turned")
        whole, cut = _outputs(tiny, ids), _TOKENS // 2
        with torch.no_grad():
            first = tiny(input_ids=ids[:, :cut], use_cache=True)
            cached = {"past_key_values": first.past_key_values, "use_cache": True}
            last = _outputs(tiny, ids[:, cut:], **cached)
        window = settings.loaded_length
        return (
            _close(whole[:, :window], plain[:, :window])
            and not _close(whole[:, window:], plain[:, window:])
            and _close(torch.cat([first[0], last], 1), whole)
        )
    finally:
        remove(tiny)


def _close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= _NOISE * expected.abs().max())


def _works(test: Any, *arguments: Any) -> bool:
    with contextlib.suppress(Exception):
        return test(*arguments)
    return False
