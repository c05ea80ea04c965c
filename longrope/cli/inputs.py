"""What the commands read: devices, models, documents. Errors name the command's arguments."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longrope.cli.folders import checked_model

#: What a model is computed in.
DTYPES = ("auto", "float32", "bfloat16", "float16")


def rank() -> int:
    """Return the number of this process in its job, 0 where there is none."""
    return int(os.environ.get("RANK", "0"))


def choose_device(name: str | None) -> str:
    """Return the device to run on, or refuse one that this machine lacks."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"--device: got {name!r}, and torch {torch.__version__} sees {count or 'no'} CUDA "
            f"device{'' if count == 1 else 's'}"
        )
    return name


def load_documents(
    name: str,
    paths: Path | Sequence[Path],
    tokenizer: Any,
    length: int,
    *,
    text_field: str = "text",
    token_dtype: str | None = None,
    token_cache: Path | None = None,
    out: Path | None = None,
) -> list[Any]:
    """Load the documents of at least `length` tokens; errors name the argument of the command.

    What was left out is said in one line on standard error. `out` is the folder of the run, which
    may lie among the documents and not be what holds them.
    """
    from longrope.documents import long_enough, read_documents

    paths = [paths] if isinstance(paths, Path) else list(paths)
    if out is not None and any(path.exists() and out.resolve() == path.resolve() for path in paths):
        raise ValueError(f"--out: expected a folder of its own, got {out}, which is {name} too")
    try:
        documents, notes = read_documents(
            paths, tokenizer, text_field=text_field, token_dtype=token_dtype, cache=token_cache
        )
    except (ValueError, OSError, ImportError) as error:
        if str(error).startswith("cache: "):
            raise type(error)(f"--token-{error}") from None
        if str(error).startswith("path: "):
            raise type(error)(f"{name}: {str(error).removeprefix('path: ')}") from None
        raise
    say(f"{name}: {notes}" if notes else "")
    listed = ", ".join(map(repr, map(str, paths)))
    kept = long_enough(documents, length, f"{name}: {listed}")
    if len(kept) < len(documents):
        say(
            f"{len(documents) - len(kept)} of {len(documents)} documents in "
            f"{', '.join(map(str, paths))} are shorter than {length} tokens and left out"
        )
    return kept


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Say which flag names a file that cannot be read: `path` is the library's argument."""
    try:
        yield
    except OSError as error:
        said = (error.strerror or str(error)).removeprefix("path: ")
        raise type(error)(f"{flag}: {said}") from None


def load_factors(
    path: Path, model: Any, length: int, *, rope_theta: float | None, attention_factor: str | None
) -> Any:
    """Load rescale factors; what a CSV file does not hold comes from the command and the model.

    `length` is the target length where the file states none. What was taken is said in one line on
    standard error.
    """
    from longrope import Tiers
    from longrope.cli.options import value_of
    from longrope.patching import rope_settings

    given = {"--rope-theta": rope_theta, "--attention-factor": attention_factor}
    if _states_settings(path):
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: expected none beside {path}, which states its own")
        return Tiers.load(path)
    rope = rope_settings(model)
    settings = {
        "rope_theta": rope.rope_theta if rope_theta is None else rope_theta,
        "original_length": rope.original_length,
        "target_length": length,
        "rotary_dim": rope.rotary_dim,
        "attention_factor": value_of(attention_factor or "su", [str, float]),
    }
    (factors,) = tiers = Tiers.load(path, **settings)
    rule = settings["attention_factor"]
    say(
        f"{path} holds factors alone: with rope theta {factors.rope_theta:g}, original length "
        f"{factors.original_length}, target length {factors.target_length}, attention factor "
        f"{factors.attention_factor:.6g}" + f" ({rule})" * isinstance(rule, str)
    )
    return tiers


def check_factors(tiers: str, *paths: Path) -> None:
    """Refuse files of factors that cannot be read, and another rule to choose from them.

    Before a model is loaded, which may take minutes.
    """
    from longrope.patching.apply import check_tiers

    check_tiers(tiers)
    for path in paths:
        _states_settings(path)


def _states_settings(path: Path) -> bool:
    from longrope.factors.files import states_settings

    with naming("--factors"):
        return states_settings(path)


def whole_numbers(name: str, text: str) -> list[int]:
    """Return the numbers that `512,1024` names; `ValueError` with the name of the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: expected numbers like 512,1024, got {text!r}") from None


def say(line: str) -> None:
    """Write a line to standard error, by the first process of a job; nothing where it is empty."""
    if line and rank() == 0:
        print(line, file=sys.stderr)


def _quiet() -> None:
    """Let transformers show errors alone."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_weights(name: str, argument: str = "MODEL") -> Any:
    """Load a model on the CPU, in eval mode and the dtype of its files.

    Errors name the command's `argument`.
    """
    from transformers import AutoModelForCausalLM

    _quiet()
    name = checked_model(argument, name)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # many kinds, of transformers, safetensors and the hub
        raise ValueError(f"{argument}: cannot load {name!r}: {_first_sentence(error)}") from None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        for parameter, value in model.named_parameters():
            # transformers fills it with random numbers, and says so in a warning.
            if value is head.weight and parameter in info["missing_keys"]:
                raise ValueError(
                    f"{argument}: expected the weights of a causal language model, got {name!r} "
                    f"without {parameter}"
                )
    return model.eval()


def load_model(
    name: str, device: str | None = None, dtype: str = "auto", out: Path | None = None
) -> tuple[Any, Any]:
    """Load `(model, tokenizer)`; the tokenizer is None for a byte-level model (vocabulary 256).

    `dtype` and `out` are those of `on_device`.
    """
    from transformers import AutoTokenizer

    from longrope.checkpoints.source import TOKENIZER_FILES

    device = choose_device(device)
    model = on_device(load_weights(name), device, dtype, out)
    tokenizer = None
    if model.config.vocab_size != 256:
        folder = Path(os.path.expanduser(name))
        if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise ValueError(f"MODEL: expected a folder with a tokenizer, got {name!r} without one")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                os.path.expanduser(name), trust_remote_code=False
            )
        except Exception as error:
            raise ValueError(
                f"MODEL: cannot load the tokenizer of {name!r}: {_first_sentence(error)}"
            ) from None
    return model, tokenizer


def has_tiers(name: str) -> bool:
    """Say whether MODEL is a folder that `longrope.export` wrote, with tiers beside the weights."""
    from longrope.checkpoints.hf import ABOUT

    return (Path(os.path.expanduser(name)) / ABOUT).is_file()


def load_extended(
    name: str, device: str | None = None, dtype: str = "auto", out: Path | None = None
) -> tuple[Any, Any]:
    """Load `(model, tokenizer)` of such a folder as `load_model` does, with its tiers applied."""
    import longrope

    _quiet()
    device = choose_device(device)
    name = checked_model("MODEL", name)
    try:
        model, tokenizer = longrope.load(name)
    except Exception as error:  # many kinds, of transformers, safetensors and json
        raise ValueError(f"MODEL: cannot load {name!r}: {_first_sentence(error)}") from None
    if model.config.vocab_size == 256:
        tokenizer = None
    elif tokenizer is None:
        raise ValueError(f"MODEL: expected a folder with a tokenizer, got {name!r} without one")
    return on_device(model, device, dtype, out), tokenizer


def on_device(
    model: Any, device: str, dtype: str = "auto", out: Path | None = None, argument: str = "MODEL"
) -> Any:
    """Move a model to a device, in a dtype: `"auto"`, or the name of one.

    `"auto"` is the model's own, but on a CPU the faster of that and float32, which a line on
    standard error says; and what the run in the folder `out` began in, wherever that was.
    """
    import torch

    from longrope.evaluation.memory import compute_dtype
    from longrope.patching.wrappers import dtype_of
    from longrope.runs.folder import noted

    if dtype not in DTYPES:
        raise ValueError(
            f"--dtype: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}"
        )
    begun = None if out is None else noted(out, "dtype")
    if begun in DTYPES and dtype not in ("auto", begun):
        raise ValueError(f"--dtype: expected {begun}, as the run in {out} began, got {dtype!r}")
    chosen = own = dtype_of(model)
    if dtype != "auto":
        chosen = getattr(torch, dtype)
    elif begun in DTYPES:
        chosen = getattr(torch, begun)
    elif device == "cpu":
        chosen = compute_dtype(model)
        if chosen != own:
            say(
                f"{argument}: its {_named(own)} weights are widened to {_named(chosen)}, which "
                f"this processor computes in faster (--dtype {_named(own)} keeps them)"
            )
    return (model if chosen == own else model.to(chosen)).to(device)


def _named(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _first_sentence(error: Exception) -> str:
    return re.split(r"(?<=[.!?])\s|\n", str(error).strip(), maxsplit=1)[0] or type(error).__name__
