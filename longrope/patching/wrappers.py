"""What stands around a transformers model: compilers, parallel engines, adapters, offloading.

One mechanism for all of them. `language_model` is for reading: the configuration, the embeddings,
the decoder. `called_model` is for running: what may be left off without changing a result is, and
what brings the weights together for a forward pass stays. `device_of` and `dtype_of` ask for what a
forward pass runs in, where weights may lie on the disk or be packed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: Where a wrapper keeps what it wraps: `torch.compile`; FSDP; activation checkpointing; DDP,
#: DataParallel and DeepSpeed.
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
#: Where torch keeps its quantised layers, by release.
_QUANTIZED = ("torch.ao.nn.quantized", "torch.nn.quantized")


def language_model(model: Any) -> Any:
    """Return the transformers model inside any wrappers; anything else as it is."""
    while True:
        inner = _inside(model)
        if inner is None and hasattr(model, "get_base_model"):  # PEFT
            inner = model.get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def called_model(model: nn.Module) -> nn.Module:
    """Return the module to call for a forward pass that is the model's.

    Without `torch.compile`, whose graphs are of other factors, and without data parallelism, which
    waits for other processes at every pass. Sharded weights and adapters keep their wrapper.
    """
    while not _gathers_weights(model):
        inner = _inside(model)
        if inner is None:
            return model
        model = inner
    return model


def is_sharded(model: nn.Module) -> bool:
    """Say whether any weights are whole only during the forward pass of what wraps them (FSDP)."""
    return any(map(_gathers_weights, model.modules()))


def unwrapped(module: nn.Module) -> nn.Module:
    """Return a part of a model, such as its decoder, without wrappers of its own."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(model: Any) -> nn.Module | None:
    if not isinstance(model, nn.Module):
        return None
    for name in _INNER:
        # Not getattr: many wrappers answer for what they wrap.
        inner = model.__dict__.get(name, model._modules.get(name))
        if isinstance(inner, nn.Module):
            return inner
    return None


def _gathers_weights(module: nn.Module) -> bool:
    if "_fsdp_wrapped_module" in module._modules:
        return True
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported by whoever shards
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a forward pass takes its token ids on.

    That of the embedding where it is known; for weights that accelerate brings from the CPU or the
    disk for each pass, the device that it brings them to.
    """
    inner = language_model(model)
    embedding = getattr(inner, "get_input_embeddings", lambda: None)()
    # FSDP may have taken the parameters out of all modules but its own.
    places = [embedding, inner, model] if isinstance(embedding, nn.Module) else [inner, model]
    for module in places:
        for part in module.modules():
            found = _execution_device(part)
            if found is not None:
                return found
        for tensor in module.parameters():
            if tensor.device.type != "meta":
                return tensor.device
    return next(model.parameters()).device


@contextlib.contextmanager
def running_eagerly(model: nn.Module) -> Iterator[None]:
    """Leave compiled parts of a model uncompiled inside the block.

    Measuring changes factors, shapes and gradient modes all the time, and each would be compiled.
    """
    compiled = any(
        "_orig_mod" in part._modules or part._compiled_call_impl is not None
        for part in model.modules()
    )
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield


def is_offloaded(model: nn.Module) -> bool:
    """Say whether accelerate brings weights to the device for each pass, and drops them after."""
    return any(
        getattr(one, "offload", False) for module in model.modules() for one in hooks_of(module)
    )


def is_quantized(model: nn.Module) -> bool:
    """Say whether a model has layers of torch's own quantisation, which know no gradients."""
    return any(type(module).__module__.startswith(_QUANTIZED) for module in model.modules())


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks that accelerate has put on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _execution_device(module: nn.Module) -> torch.device | None:
    """Return where accelerate's hook of a module runs it; None: there is no such hook."""
    for one in hooks_of(module):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's activations: of its first weight that is a plain float."""
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1:
            return parameter.dtype
    return torch.get_default_dtype()


def dtype_note(model: nn.Module) -> dict[str, str]:
    """Return what the journal of a run notes, so that it goes on in the dtype that it began in."""
    return {"dtype": str(dtype_of(model)).removeprefix("torch.")}


def is_plain(weight: Any) -> bool:
    """Say whether a weight is an ordinary tensor of floats that is here, as the kernels take it."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.dtype.is_floating_point
        and weight.device.type != "meta"
    )
