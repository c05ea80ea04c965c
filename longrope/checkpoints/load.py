"""`longrope.load`: a folder that longrope wrote, with its tiers in force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longrope.checkpoints.hf import ABOUT, with_rope
from longrope.checkpoints.source import TOKENIZER_FILES
from longrope.factors import Tiers
from longrope.patching import apply
from longrope.patching.families import family_of


def load(path: str | Path, **options: Any) -> tuple[Any, Any]:
    """Load a folder that `longrope.export` wrote, with its tiers by position applied.

    Families that have none (gpt-oss) get the tiers by row.

    The configuration of the source is put back first, so that the first tier is the model as it was
    before the export, bit for bit where `tiers[0]` is the model as loaded.

    Parameters
    ----------
    path
        The folder; it holds `longrope.json`.
    **options
        Keyword arguments of transformers' `from_pretrained`; `dtype` is "auto" unless given.

    Returns
    -------
    model, tokenizer
        In eval mode; None for the tokenizer of a folder without one.

    Raises
    ------
    ValueError, OSError
        In one sentence that names the file and what is wrong with it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = Path(path)
    if not (path / ABOUT).is_file():
        raise ValueError(
            f"path: expected a folder that longrope.export wrote, got {str(path)!r}, which holds "
            f"no {ABOUT}"
        )
    tiers = Tiers.load(path / ABOUT)
    content = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    try:
        source = content["about"]["source"]
        lengths = (source["max_position_embeddings"], source["original_max_position_embeddings"])
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config = with_rope(raw, source["rope"], *lengths)
    except (KeyError, TypeError):
        raise ValueError(f'{path / ABOUT}: expected the source\'s settings under "about"') from None
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=CONFIG_MAPPING[raw["model_type"]].from_dict(config),
        **({"dtype": "auto", "trust_remote_code": False} | options),
    )
    has_tokenizer = any((path / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = (
        AutoTokenizer.from_pretrained(path, trust_remote_code=False) if has_tokenizer else None
    )
    rule = "position" if family_of(model).tiers else "row"
    return apply(model.eval(), tiers, tiers=rule), tokenizer
