"""Plans that have a name, and the one that follows from the ratio of the lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope.extension.config import FinetuneConfig
from longrope.extension.plan import FinetuneStage, Plan, read_stages, stage_of

#: The ratio that a search alone reaches (LongRoPE, section 3.2).
SEARCHED = 8
#: Up to this ratio one stage of fine-tuning is enough: 8 by it, and 8 more by the second search.
TRAINED_ONCE = SEARCHED * SEARCHED
#: Above this length the paper searches with half the sizes and 3 documents.
HALVED_ABOVE = 512 * 1024
#: Tokens of a row of the paper's Mistral, whatever the factors reach.
MISTRAL_ROWS = 16 * 1024


def by_ratio(window: int, target: int, finetune: FinetuneConfig | None) -> list[dict[str, Any]]:
    """Return the stages that lead from a window of `window` tokens to `target`.

    Without fine-tuning one search. Up to 8 times the window a search and training under its tiers;
    beyond, training at the longest length from which a second search of at most 8 times reaches the
    target, in two steps where that length is more than 8 windows (LongRoPE, section 3.3).
    """
    if finetune is None:
        return [{"kind": "search", "length": target}]
    if target <= SEARCHED * window:
        middle = [target]
    elif target <= TRAINED_ONCE * window:
        middle = [SEARCHED * window]
    else:
        middle = [target // (2 * SEARCHED), target // SEARCHED]
    stages = [{"kind": "search", "length": length, "name": f"search-{length}"} for length in middle]
    stages += [
        {"kind": "finetune", "length": length, "factors": f"search-{length}"} for length in middle
    ]
    if middle[-1] < target:
        stages.append({"kind": "search", "length": target})
    return stages + _recovered(window, target)


def _recovered(window: int, target: int) -> list[dict[str, Any]]:
    lengths = [length for length in (window, 2 * window) if length < target]
    return [{"kind": "recover", "lengths": lengths}]


def _paper(
    window: int, target: int, rows: Callable[[int], int], training: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """LongRoPE, section 3.3 and appendix A: two searches, training under one set and the next."""
    short, middle = target // 16, target // 8

    def search(length: int, **more: Any) -> dict[str, Any]:
        preset = "paper-long" if length > HALVED_ABOVE else "paper"
        how = {"method": "evolution", "preset": preset, "tiers": "one"}
        return {"kind": "search", "length": length, **how, **more}

    return [
        search(short, name=f"search-{short}"),
        search(middle, name=f"search-{middle}"),
        *(
            {
                "kind": "finetune", "length": rows(length), "factors": f"search-{length}",
                "tiers": "one", **how,
            }
            for length, how in zip((short, middle), training, strict=True)
        ),
        search(target),
        *_recovered(window, target),
    ]  # fmt: skip


def paper_llama2(window: int, target: int) -> list[dict[str, Any]]:
    """LongRoPE's LLaMA2: 400 steps at 1/16 of the target, 600 at 1/8, batches of 32, 2e-5."""
    how = {"learning_rate": 2e-5, "decay": "linear", "batch_size": 32}
    return _paper(
        window, target, lambda length: length, [{"steps": 400, **how}, {"steps": 600, **how}]
    )


def paper_mistral(window: int, target: int) -> list[dict[str, Any]]:
    """LongRoPE's Mistral: the same on rows of 16k tokens, batches of 64, a constant 1e-6.

    Rows of 16k where the factors reach so far, and never shorter than the model's window.
    """
    how = {"learning_rate": 1e-6, "decay": "constant", "batch_size": 64}
    return _paper(
        window,
        target,
        lambda length: min(length, max(MISTRAL_ROWS, window)),
        [{"steps": 400, **how}, {"steps": 600, **how}],
    )


def longrope2(window: int, target: int) -> list[dict[str, Any]]:
    """LongRoPE2 (arXiv 2502.20082): needles, the critical dimension, mixed windows.

    One search at the target, then 10 G tokens of training, a tenth of them in short rows that keep
    the original RoPE. The learning rate and the batch are LongRoPE's for LLaMA2.
    """
    return [
        {
            "kind": "search", "length": target, "method": "evolution", "objective": "needle",
            "critical_dimension": True, "tiers": "one", "name": f"search-{target}",
        },
        {
            "kind": "finetune", "length": target, "tiers": "row", "short_share": 0.1,
            "learning_rate": 2e-5, "decay": "linear", "batch_size": 32,
            "steps": max(20, round(10e9 / (32 * target))),
        },
    ]  # fmt: skip


#: The recipes of the papers, by name.
NAMED = {
    "longrope-llama2": paper_llama2,
    "longrope-mistral": paper_mistral,
    "longrope2": longrope2,
}


def make_plan(
    window: int,
    target: int,
    finetune: FinetuneConfig | None,
    stages: str | Path | Sequence[Mapping[str, Any]] | None,
    seed: int,
) -> Plan:
    """Return the plan that the arguments of `longrope.extend` ask for.

    `stages` is the name of a recipe, a TOML file, a list of tables, or None: by the ratio. Fields
    that `finetune` was given win over a recipe. In a file or a list a stage of fine-tuning says
    itself what it differs in: a field, but for the seed, that is given in both places, in two ways,
    is refused.

    Raises `ValueError` in one sentence.
    """
    if finetune is not None and not isinstance(finetune, FinetuneConfig):
        raise ValueError(
            f"finetune: expected None or a FinetuneConfig, got {type(finetune).__name__}"
        )
    if target <= window:
        raise ValueError(
            f"target_length: expected more than the window of the model as loaded, {window} "
            f"tokens, got {target}"
        )
    if stages is None:
        tables: Sequence[Mapping[str, Any]] = by_ratio(window, target, finetune)
    elif isinstance(stages, str) and stages in NAMED:
        tables = [_winning(table, finetune) for table in NAMED[stages](window, target)]
    elif isinstance(stages, (str, Path)):
        if not Path(stages).is_file():
            names = ", ".join(NAMED)
            raise ValueError(
                f"stages: expected one of {names}, or a TOML file, got {str(stages)!r}"
            )
        tables = read_stages(stages)
    elif isinstance(stages, Sequence):
        tables = stages
    else:
        raise ValueError(
            "stages: expected the name of a recipe, a TOML file or a list of tables, got "
            f"{type(stages).__name__}"
        )
    defaults = finetune or FinetuneConfig()
    made = []
    for number, table in enumerate(tables, 1):
        made.append(stage_of(table, number, defaults, seed))
        if isinstance(made[-1], FinetuneStage):
            _refuse_twice(table, number, defaults)
    return Plan(target, window, tuple(made), seed)


def _winning(table: dict[str, Any], finetune: FinetuneConfig | None) -> dict[str, Any]:
    """Return a stage of a recipe with what the caller asked for instead."""
    if finetune is None or table["kind"] != "finetune":
        return table
    return table | {name: value for name, value in finetune.given().items() if name in table}


def _refuse_twice(table: Mapping[str, Any], number: int, finetune: FinetuneConfig) -> None:
    """Refuse a field, but for the seed, that `finetune` and a stage's table say in two ways."""
    for name, value in finetune.given().items():
        if name != "seed" and name in table and table[name] != value:
            raise ValueError(
                f"{name}: expected it in finetune or in stages[{number - 1}], got {value!r} and "
                f"{table[name]!r}"
            )
