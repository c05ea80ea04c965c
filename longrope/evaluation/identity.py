"""What a resumed run must find again: a model's weights and what changes its numbers; token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longrope.patching.settings import rope_parameters, rope_settings, text_config
from longrope.patching.wrappers import hooks_of, is_sharded, language_model

#: Tokens that are hashed at a time: a document may be most of the memory.
_HASHED = 1 << 20
#: Elements of each tensor that the fingerprint reads, evenly spread.
_SAMPLES = 4096
#: Parts of a tensor's name that wrappers of modules put in.
_OF_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
#: Settings that change no logit in eval mode, beside those that every configuration has: of
#: training, of speed, of where the model lies, or what the weights show. Rope settings are apart.
_WITHOUT_EFFECT = (
    "use_cache", "tie_word_embeddings", "auto_map", "initializer_range", "pretraining_tp",
    "torch_dtype",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_experts_implementation", "experts_implementation", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "base_model_tp_plan", "base_model_pp_plan",
    "unsloth_version", "unsloth_fixed", "quantization_config",
    "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct",
    "rotary_emb_base", "original_max_position_embeddings",
)  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's settings and of a spread sample of every parameter and buffer.

    The same for one model compiled or wrapped, offloaded or not, with another attention, from
    another folder, or under another release of transformers. Of a weight that cannot be read (on
    the meta device) its name and size count.
    """
    settings = _settings(model) | _adapters(language_model(model))
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    # Sharded weights are whole in the state of what gathers them alone.
    source = model if is_sharded(model) else language_model(model)
    named = ((_name(name), name, value) for name, value in source.state_dict().items())
    for known_as, name, value in sorted(named, key=lambda entry: entry[0]):
        found.update(f"{known_as} ".encode())
        for part in _readable(source, name, value):
            found.update(part)
    return found.hexdigest()[:16]


def digest(windows: torch.Tensor) -> str:
    """Return a hash of the tokens of windows or a document, for the header of a journal.

    The same for every type that holds them.
    """
    found = hashlib.sha256(repr(tuple(windows.shape)).encode())
    flat = windows.flatten()
    for start in range(0, len(flat), _HASHED):
        found.update(flat[start : start + _HASHED].to(torch.int64).numpy().tobytes())
    return found.hexdigest()[:16]


def digests(documents: Iterable[torch.Tensor]) -> str:
    """Return a hash of documents, in their order."""
    return hashlib.sha256(" ".join(map(digest, documents)).encode()).hexdigest()[:16]


def _settings(model: nn.Module) -> dict[str, Any]:
    """Return what changes numbers in a configuration, without what is off or not stated."""
    from transformers import PretrainedConfig

    try:
        config = text_config(model)
    except TypeError:  # no model of transformers
        return {}
    if not hasattr(config, "to_dict"):
        return {}
    general = PretrainedConfig().to_dict()
    settings = {
        key: value
        for key, value in config.to_dict().items()
        if key not in general
        and key not in _WITHOUT_EFFECT
        and "drop" not in key
        and not key.endswith("token_id")
        and not (value is None or value is False)
    }
    rope = {
        key: float(value) if isinstance(value, int) else value
        for key, value in rope_parameters(config).items()
        if key not in ("type", "original_max_position_embeddings")
    }
    rope["original_length"] = rope_settings(config).original_length  # stated, or what it counts as
    return settings | {"rope": rope, "model_type": config.model_type}


def _adapters(model: nn.Module) -> dict[str, Any]:
    """Return which adapters of PEFT are in force in which layers, and their scales."""
    found = {}
    for name, module in model.named_modules():
        disabled, scales = getattr(module, "disable_adapters", None), getattr(module, "scaling", {})
        if isinstance(disabled, bool) and isinstance(scales, Mapping):
            active = [] if disabled else module.active_adapters
            found[_name(name)] = [[adapter, scales.get(adapter)] for adapter in active]
    return {"adapters": found} if found else {}


def _name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _OF_WRAPPERS)


def _readable(source: nn.Module, name: str, value: Any) -> Iterator[bytes]:
    """Yield bytes that tell a weight from others, however it is kept."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _readable(source, name, part)
        return
    if not isinstance(value, Tensor):
        plain = isinstance(value, (str, bytes, int, float, torch.dtype, type(None)))
        yield (repr(value) if plain else type(value).__name__).encode()
        return
    value = value.detach()
    if value.device.type == "meta":
        found = _offloaded(source, name)
        value = value if found is None else found
    if hasattr(value, "full_tensor"):  # a DTensor, of FSDP 2
        value = value.full_tensor()
    yield f"{value.dtype} {tuple(value.shape)} ".encode()
    if hasattr(value, "__tensor_flatten__"):  # quantised by torchao, say: of several tensors
        names, _ = value.__tensor_flatten__()
        for inner in names:
            yield from _readable(source, name, getattr(value, inner))
        return
    if value.is_quantized:
        value = value.dequantize()
    if value.device.type != "meta":
        yield _sample(value)


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.flatten()
    spread = torch.linspace(
        0, max(flat.numel() - 1, 0), min(flat.numel(), _SAMPLES), dtype=torch.float64
    )
    # As bytes: not every dtype can be indexed (float8).
    raw = flat.contiguous().view(torch.uint8).view(-1, flat.element_size())
    return raw[spread.long().to(flat.device)].cpu().numpy().tobytes()


def _offloaded(source: nn.Module, name: str) -> Tensor | None:
    """Return a weight that accelerate keeps on the CPU or the disk; None where it keeps none."""
    place, _, leaf = name.rpartition(".")
    for one in hooks_of(source.get_submodule(place)):
        weights = getattr(one, "weights_map", None)
        if isinstance(weights, Mapping):
            try:
                return torch.as_tensor(weights[leaf])
            except KeyError:
                continue
    return None
