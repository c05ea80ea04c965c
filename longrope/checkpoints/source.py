"""The folder that a model came from: what an export carries over from it."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

#: Files of a tokenizer, its chat template included.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "Notice*")
#: Lines of a model card's front matter that say under which terms a model may be used.
_TERMS = re.compile(r"^(license(?:_name|_link)?):\s*(\S.*?)\s*$", re.MULTILINE)


def checked_tokenizer(name: str, value: Any) -> Any:
    """Return a tokenizer that can be saved, or None; refuse anything else."""
    if value is not None and not callable(getattr(value, "save_pretrained", None)):
        raise ValueError(
            f"{name}: expected None or a tokenizer with save_pretrained, got {type(value).__name__}"
        )
    return value


def source_folder(model: Any) -> Path | None:
    """Return the local folder that a model was loaded from, in the hub's cache or elsewhere.

    None where there is none. Nothing is downloaded.
    """
    name = getattr(model.config, "_name_or_path", "") or ""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(
            name, "config.json", revision=getattr(model.config, "_commit_hash", None)
        )
    except ValueError:  # neither a folder nor a name on the hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def source_name(model: Any) -> str:
    """Return what a model is called: a hub name, the last part of a folder's, or nothing."""
    name = getattr(model.config, "_name_or_path", "") or ""
    return name if not name or is_hub_name(name) else Path(name).resolve().name


def is_hub_name(name: str) -> bool:
    """Say whether a name is one of the hub, `owner/model`, and no folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def shard_size(source: Path | None) -> int | None:
    """Return the bytes of tensors in the largest safetensors file of a folder; None: no such file.

    A split by that size gives shards of the size that the source's are made for.
    """
    sizes = []
    for file in source.glob("model*.safetensors") if source else ():
        with file.open("rb") as content:
            (header,) = struct.unpack("<Q", content.read(8))
        sizes.append(file.stat().st_size - 8 - header)
    return max(sizes, default=None)


def carry_tokenizer(source: Path | None, folder: Path, target_length: int) -> bool:
    """Copy the files of a tokenizer, and let it cut texts at the new window at the earliest.

    Returns whether there were any.
    """
    found = [source / name for name in TOKENIZER_FILES] if source else []
    found = [file for file in found if file.is_file()]
    for file in found:
        shutil.copyfile(file, folder / file.name)
    if source and (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES)
    lengthen_tokenizer(folder, target_length)
    return bool(found)


def lengthen_tokenizer(folder: Path, target_length: int) -> None:
    """Raise `model_max_length` in a tokenizer's configuration to the new window."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    limit = content.get("model_max_length")
    if isinstance(limit, int) and limit < target_length:
        content["model_max_length"] = target_length
        text = json.dumps(content, indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def carry_licence(source: Path | None, folder: Path) -> list[str]:
    """Copy the files of a licence; returns their names."""
    found = {file for pattern in _LICENCES for file in source.glob(pattern)} if source else set()
    names = sorted(file.name for file in found if file.is_file())
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def terms(source: Path | None) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` as the card of a source states them."""
    card = source / "README.md" if source else None
    if card is None or not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    return {key: value.strip("'\"") for key, value in _TERMS.findall(parts[1])}
