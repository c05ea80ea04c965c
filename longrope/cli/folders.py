"""The argument MODEL before anything is loaded: a folder, or a name on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from longrope._files import strict_json


def checked_model(argument: str, name: str) -> str:
    """Return the folder or hub name of a model that transformers can load by itself.

    No code of the folder runs, nobody is asked whether it may, and what looks like a path is not
    looked up on the hub. Raises `ValueError` in one sentence that names the command's `argument`.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        check_config(argument, folder)
        return str(folder)
    beside = "/" in name and Path(name.split("/")[0]).is_dir()
    if folder.exists() or not _NAME.fullmatch(name) or beside:
        raise ValueError(f"{argument}: expected a folder with a Hugging Face model, got {name!r}")
    _check_hub(argument, name)
    return name


#: What a repository on the hub can be called.
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_config(argument: str, folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's `config.json`, of a kind that transformers has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{argument}: the folder {str(folder)!r} has no config.json")
    try:
        content = strict_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("something else than an object")
    except OSError as error:
        raise ValueError(f"{argument}: cannot read {path} ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{argument}: {path}: expected JSON, got {_as_reason(error)}") from None
    kind = content.get("model_type")
    if "auto_map" in content and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        raise ValueError(
            f"{argument}: expected a model that transformers has, got {str(folder)!r}, whose "
            f"model_type {kind!r} needs code of the folder's own (auto_map), which longrope does "
            "not run"
        )
    return content


def _as_reason(error: ValueError) -> str:
    return str(error) if type(error) is ValueError else f"a file broken at {error}"


def _check_hub(argument: str, name: str) -> None:
    """Refuse a name that the hub does not know: at once, where loading would try for long."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # of the hub's package or of the library that it calls
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{argument}: expected a folder with a Hugging Face model or the name of one on the "
            f"hub, got {name!r}, which is no folder here and not found on the hub ({reason[:120]})"
        ) from None
