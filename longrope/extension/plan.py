"""What a run of `longrope.extend` does: a plan of stages, checked before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longrope._validation import choice, integer
from longrope.extension.config import FinetuneConfig, RecoverOptions
from longrope.factor_search.options import SearchOptions
from longrope.report.extension import EXPORT
from longrope.runs.options import Options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SEARCH_KEYS = tuple(
    f.name
    for f in dataclasses.fields(SearchOptions)
    if f.name not in ("target_length", "original_length", "shard_sequence", "ladder")
)
_FINETUNE_KEYS = tuple(f.name for f in dataclasses.fields(FinetuneConfig))
_RECOVER_KEYS = tuple(f.name for f in dataclasses.fields(RecoverOptions))


@dataclass(frozen=True)
class SearchStage:
    """Search factors for `length` tokens, on from those that the weights were trained with.

    Attributes
    ----------
    name
        What later stages and the run folder call it.
    length
        The window to reach, in tokens.
    tiers
        `"position"`: a ladder of tiers; `"one"`: one set for every position.
    options
        Keyword arguments of `longrope.search`.
    """

    name: str
    length: int
    tiers: str = "position"
    options: Mapping[str, Any] = field(default_factory=dict)

    kind = "search"


@dataclass(frozen=True)
class FinetuneStage:
    """Train the weights on rows of `length` tokens under the factors of an earlier search.

    Attributes
    ----------
    name, length
        As in `SearchStage`; the tokens of a row.
    factors
        The name of the search; None: the last one before.
    config
        How to train; its seed and its warm-up are numbers here.
    """

    name: str
    length: int
    factors: str | None = None
    config: FinetuneConfig = field(default_factory=FinetuneConfig)

    kind = "finetune"

    def __post_init__(self):
        object.__setattr__(self, "config", self.config.resolved())  # the way into a frozen one


@dataclass(frozen=True)
class RecoverStage:
    """Search tiers for short texts, weights untouched, see `longrope.recover`.

    Attributes
    ----------
    name
        As in `SearchStage`.
    lengths
        The ends of the tiers, in tokens.
    options
        What `longrope.recover` is asked for.
    """

    name: str
    lengths: tuple[int, ...]
    options: RecoverOptions = field(default_factory=RecoverOptions)

    kind = "recover"


Stage = SearchStage | FinetuneStage | RecoverStage
#: Keys of a stage as a table, by its kind, beside "kind" and "name".
_KEYS = {
    "search": ("length", "tiers", *_SEARCH_KEYS),
    "finetune": ("length", "factors", *_FINETUNE_KEYS),
    "recover": ("lengths", *_RECOVER_KEYS),
}


def stage_of(table: Mapping[str, Any], number: int, defaults: FinetuneConfig, seed: int) -> Stage:
    """Return a stage from its table, as a TOML file or a caller writes it.

    `number` counts stages from 1, for names and messages; `defaults` is what a stage of fine-tuning
    does not say itself, `seed` that of a stage that names none.

    Raises `ValueError` in one sentence that names the stage and the key.
    """
    where = f"stages[{number - 1}]"
    if not isinstance(table, Mapping):
        raise ValueError(f"{where}: expected a table, got {type(table).__name__}")
    given = dict(table)
    kind = choice(f"{where}.kind", given.pop("kind", None), tuple(_KEYS))
    for key in given:
        if key not in ("name", *_KEYS[kind]):
            near = difflib.get_close_matches(key, _KEYS[kind], n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{where}: {key}: a stage of kind {kind!r} has no such key{meant}")
    name = given.pop("name", None)
    if name is not None and (not isinstance(name, str) or not name.replace("-", "").isalnum()):
        raise ValueError(f"{where}.name: expected letters, digits and hyphens, got {name!r}")
    try:
        if kind == "recover":
            lengths = given.pop("lengths", None)
            if not isinstance(lengths, Sequence) or isinstance(lengths, str) or not lengths:
                raise ValueError(f"lengths: expected a list of lengths, got {lengths!r}")
            lengths = tuple(integer("lengths", length, 4) for length in lengths)
            options = RecoverOptions(**{"seed": seed, **given})
            return RecoverStage(name or f"recover-{number}", lengths, options)
        length = integer("length", given.pop("length", None), 2)
        name = name or f"{kind}-{number}"
        if kind == "search":
            tiers = choice("tiers", given.pop("tiers", "position"), ("position", "one"))
            options = {"seed": seed, **given}
            checked = SearchOptions(target_length=length, ladder=tiers == "position", **options)
            options = {key: getattr(checked, key) for key in options}  # no infinity, for JSON
            return SearchStage(name, length, tiers, options)
        factors = given.pop("factors", None)
        config = dataclasses.replace(defaults, **given).resolved(seed)
        return FinetuneStage(name, length, factors, config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Plan:
    """The stages of a run.

    Attributes
    ----------
    target_length
        The window to reach, in tokens.
    window
        That of the model as loaded.
    stages
        What is done, in order. The BOS that one of them names is that of all.
    seed
        Of the documents that are held out, and of stages that name none.
    """

    target_length: int
    window: int
    stages: tuple[Stage, ...]
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "stages", _of_one_bos(self.stages))  # the way into a frozen one
        if self.target_length <= self.window:
            raise ValueError(
                "target_length: expected more than the window of the model as loaded, "
                f"{self.window} tokens, got {self.target_length}"
            )
        searches = [stage for stage in self.stages if isinstance(stage, SearchStage)]
        trained = [stage for stage in self.stages if isinstance(stage, FinetuneStage)]
        if not searches or searches[-1].length != self.target_length:
            last = searches[-1].length if searches else "no search"
            raise ValueError(
                f"stages: expected the last search to reach target_length {self.target_length}, "
                f"got {last}"
            )
        for few in (searches, trained):
            lengths = [stage.length for stage in few]
            for before, after in itertools.pairwise([self.window, *lengths]):
                if after < before or (after == before and few is searches):
                    raise ValueError(
                        f"stages: expected lengths of {few[0].kind} stages that grow from the "
                        f"model's window of {self.window} tokens, got {lengths}"
                    )
        self._check_names()
        self._check_short_rows()
        for stage, after in itertools.combinations(self.stages, 2):
            per = stage.options.get("per", "model") if isinstance(stage, SearchStage) else "model"
            if per != "model" and not isinstance(after, FinetuneStage):
                raise ValueError(
                    f"stages: expected per='model' in {stage.name}, from whose factors "
                    f"{after.name} goes on, got {per!r}"
                )
        for number, stage in enumerate(self.stages):
            if not isinstance(stage, RecoverStage):
                continue
            ends = list(stage.lengths)
            if ends != sorted(set(ends)) or ends[-1] >= self.target_length:
                raise ValueError(
                    f"stages[{number}]: lengths: expected growing lengths below target_length "
                    f"{self.target_length}, got {ends}"
                )
            if number != len(self.stages) - 1:
                raise ValueError(f"stages[{number}]: expected recovery as the last stage")

    def _check_names(self) -> None:
        seen: dict[str, Stage] = {}
        reached = None  # by the factors so far: the search that found them
        for number, stage in enumerate(self.stages):
            if stage.name in seen or stage.name == EXPORT:
                raise ValueError(f"stages[{number}].name: {stage.name!r} is taken already")
            if isinstance(stage, SearchStage):
                reached = stage
            if isinstance(stage, FinetuneStage):
                before = [s for s in seen.values() if isinstance(s, SearchStage)]
                known = [s.name for s in before]
                if stage.factors not in (None, *known) or not before:
                    raise ValueError(
                        f"stages[{number}].factors: expected the name of a search before it "
                        f"({', '.join(known) or 'there is none'}), got {stage.factors!r}"
                    )
                reached = next(s for s in reversed(before) if stage.factors in (None, s.name))
                if stage.length > reached.length:
                    raise ValueError(
                        f"stages[{number}].length: expected at most what the factors of "
                        f"{reached.name} reach, {reached.length} tokens, got {stage.length}"
                    )
            seen[stage.name] = stage
        if reached.length != self.target_length:
            raise ValueError(
                f"stages: expected the last fine-tuning under factors that reach target_length "
                f"{self.target_length}, or a search after it, got those of {reached.name}, "
                f"{reached.length} tokens"
            )

    @property
    def bos(self) -> str | bool | int:
        """What stands in front of every window: of all stages, and of the table."""
        return _bos_of(self.stages[0])

    def _check_short_rows(self) -> None:
        """Refuse a length of short rows that no stage uses, or that a row is too short for."""
        stages = [stage for stage in self.stages if isinstance(stage, FinetuneStage)]
        asked = [stage for stage in stages if stage.config.short_length is not None]
        mixed = [stage for stage in asked if stage.config.short_share]
        if asked and not mixed:
            raise ValueError(
                "short_length: expected short_share above 0 beside it, got "
                f"{asked[0].config.short_length} without any"
            )
        for stage in mixed:
            if stage.config.short_length > stage.length:
                raise ValueError(
                    f"short_length: expected at most the {stage.length} tokens of a row of "
                    f"{stage.name}, got {stage.config.short_length}"
                )

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, stages by name: what a resumed run must share."""
        stages = {}
        for number, stage in enumerate(self.stages, 1):
            fields = {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)}
            fields |= {
                name: dataclasses.asdict(value)
                for name, value in fields.items()
                if isinstance(value, Options)
            }
            if isinstance(stage, RecoverStage) and stage.options.bos == "auto":
                del fields["options"]["bos"]  # as before there was a choice: such runs resume
            stages[fields.pop("name")] = {"number": number, "kind": stage.kind, **fields}
        return {**vars(self), "stages": stages}


def _bos_of(stage: Stage) -> str | bool | int:
    if isinstance(stage, SearchStage):
        return stage.options.get("bos", "auto")
    return (stage.config if isinstance(stage, FinetuneStage) else stage.options).bos


def _of_one_bos(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return stages with the BOS that any of them names; `ValueError` where two name two."""
    named = {stage.name: _bos_of(stage) for stage in stages if _bos_of(stage) != "auto"}
    if len({repr(bos) for bos in named.values()}) > 1:
        raise ValueError(f"stages: expected one bos for all of them, got {named}")
    for bos in list(named.values())[:1]:
        stages = [_with_bos(stage, bos) for stage in stages]
    return tuple(stages)


def _with_bos(stage: Stage, bos: bool | int) -> Stage:
    if isinstance(stage, FinetuneStage):
        return dataclasses.replace(stage, config=dataclasses.replace(stage.config, bos=bos))
    if isinstance(stage, RecoverStage):
        return dataclasses.replace(stage, options=dataclasses.replace(stage.options, bos=bos))
    return dataclasses.replace(stage, options={**stage.options, "bos": bos})


def recorded_tables(stages: Mapping[str, Any], seed: Any) -> list[dict[str, Any]]:
    """Return the tables of the stages that `Plan.as_dict` has, of a plan with this seed.

    Without what they took over: the seed of the plan, and the warm-up that follows from the steps.

    Raises `ValueError` for what is no plan.
    """
    tables = []
    try:
        for name, stage in stages.items():
            given = dict(stage)
            del given["number"]
            table = {"name": name, **given.pop("options", {}), **given.pop("config", {}), **given}
            if table.get("seed") == seed:
                table.pop("seed", None)
            if table["kind"] == "finetune":
                usual = FinetuneConfig(steps=table["steps"]).resolved().warmup_steps
                if table["warmup_steps"] == usual:
                    del table["warmup_steps"]
            tables.append(table)
    except (AttributeError, KeyError, TypeError):
        raise ValueError("stages: expected those of a run of longrope extend") from None
    return tables


def read_stages(path: str | Path) -> list[dict[str, Any]]:
    """Return the tables `[[stages]]` of a TOML file; `ValueError` names the file."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"stages: cannot read {path} ({error.strerror})") from None
    except RecursionError:
        raise ValueError(f"{path}: expected TOML, got values nested too deeply") from None
    except ValueError as error:  # of the encoding or of TOML
        raise ValueError(f"{path}: expected TOML, got a file broken at: {error}") from None
    stages = content.pop("stages", None)
    if content or not isinstance(stages, list) or not stages:
        found = next(iter(content), "no stages")
        raise ValueError(f"{path}: expected [[stages]] tables alone, got {found}")
    return stages
