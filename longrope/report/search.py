"""The report of a search, from what its folder holds: the journal, and the results once there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.factors import RescaleFactors, Tiers
from longrope.report import figures
from longrope.report.page import Command, Figure, Page, Row, Section, Table
from longrope.report.parts import (
    factor_rows,
    flat,
    json_object,
    label,
    lambda_figure,
    tier_figure,
    tier_rows,
)
from longrope.runs import journal, times
from longrope.runs.folder import CONFIG, JOURNAL
from longrope.runs.style import METHODS, STYLES, line

KIND = "search"
FACTORS, TIERS, SUMMARY = "factors.json", "tiers.json", "summary.json"
#: What windows are for, as the journal says it, in words.
_WINDOWS = {"screen": "first windows", "search": "search windows", "validation": "held-out windows"}
#: Factors that need no search, by their origin in the journal; these are always drawn.
_RULES = ("pi", "ntk", "yarn")
_CLOSED_FORMS = (*_RULES, *(n for n in STYLES if n not in (*_RULES, "none", *METHODS)))
_FOUND = "searched"


def page(out: Path, shown: str) -> Page:
    """Return the report of a search; `shown` is the path of its folder for commands."""
    run = Search.read(out)
    target = run.problem["target_length"]
    deciding = run.deciding
    found = Page(
        title=f"Rescale factors for {target} tokens",
        lead=f"A search by {run.header['method']} for the window of {target} tokens of a model "
        f"that was trained for {run.problem['original_length']}.",
        finished=run.factors is not None,
        settings=run.settings(),
    )
    values = run.by_set()
    ours = values.get(_FOUND, {}).get(deciding)
    if ours is not None:
        where = "perplexity of the last tier" if run.ladder else "perplexity"
        found.facts.append((f"{where}, {_WINDOWS[deciding]}", f"{ours:.3f}"))
    for name, words in (("yarn", "with YaRN"), ("none", "as loaded")):
        if values.get(name, {}).get(deciding) is not None:
            found.facts.append((words, f"{values[name][deciding]:.3f}"))
    if run.passes is not None:
        found.facts.append(("cost, forward passes of a window", f"{run.passes:.0f}"))
    if run.factors is not None:
        found.facts.append(("attention factor", f"{run.factors.attention_factor:.4g}"))
        found.facts.append(("start tokens", str(run.factors.start_tokens)))
    found.sections = [*run.perplexity_sections(shown), *run.factor_sections()]
    found.rows = run.rows()
    found.cover = next((f.name for f in found.figures() if f.name == "search"), None)
    return found


class Search:
    """A search as its folder holds it; attributes are what the files say."""

    def __init__(self, header: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], out: Path):
        self.header, self.entries, self.out = header, entries, out
        self.problem = header["problem"]
        self.ladder = header.get("ladder")
        self.factors = RescaleFactors.load(out / FACTORS) if (out / FACTORS).is_file() else None
        self.tiers = Tiers.load(out / TIERS) if (out / TIERS).is_file() else None
        summary = json_object(out / SUMMARY) if (out / SUMMARY).is_file() else {}
        self.passes = summary.get("forward_passes")
        self.loaded: Mapping[str, float | None] = summary.get("as_loaded", {})
        stage = self.problem.get("stage")
        self.stage = np.array(list(map(float, stage["lambdas"]))) if stage else None

    @classmethod
    def read(cls, out: Path) -> Search:
        """Read a folder; `JournalError` or `ValueError` in one sentence where it is damaged."""
        header, entries = journal.read(out / JOURNAL)
        try:
            return cls(header, entries, out)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{out / JOURNAL}: expected the journal of a search of this version, got one "
                f"without {error}"
            ) from None

    @property
    def deciding(self) -> str:
        """The role of the windows that decided."""
        roles = {entry["role"] for entry in self.entries}
        return "validation" if "validation" in roles else "search"

    @property
    def last_tier(self) -> int | None:
        """The number of the last tier that was begun, in a ladder."""
        return max((e["tier"] for e in self.entries), default=1) if self.ladder else None

    def measured(self, tier: int | None = None) -> list[tuple[int, float]]:
        """Return `(number, perplexity)` of all candidates on the search windows, in order."""
        return [
            (number, _perplexity(entry["nll"]))
            for number, entry in enumerate(self._of(tier), 1)
            if entry["role"] == "search"
        ]

    def _of(self, tier: int | None) -> list[Mapping[str, Any]]:
        return [entry for entry in self.entries if entry.get("tier") == tier]

    def reached(self, tier: int | None, role: str) -> dict[str, float]:
        """Return the perplexity of each rule on the windows of a role."""
        return {
            entry["origin"]: _perplexity(entry["nll"])
            for entry in self._of(tier)
            if entry["role"] == role and entry.get("origin") in _CLOSED_FORMS
        }

    def drawn(self, tier: int | None) -> list[str]:
        """Return the closed forms to draw: PI, NTK, YaRN, and the best where it is another."""
        reached = self.reached(tier, "search") or self.reached(tier, "screen")
        best = [min(reached, key=lambda name: reached[name])] if reached else []
        return list(dict.fromkeys([*_RULES, *best]))

    def by_set(self) -> dict[str, dict[str, float]]:
        """Return perplexities by the name of a style, or `"searched"`, and role."""
        tier, found = self.last_tier, {}
        if any(value is not None for value in self.loaded.values()):
            found["none"] = {role: _perplexity_or_inf(v) for role, v in self.loaded.items()}
        for role in _WINDOWS:
            for name, value in self.reached(tier, role).items():
                found.setdefault(name, {})[role] = value
        ours = {}
        for role in _WINDOWS:
            same = [e for e in self._of(tier) if e["role"] == role and self._is_chosen(e)]
            if same:
                ours[role] = _perplexity(same[-1]["nll"])
            elif self.factors is None and role != "screen":
                losses = [e["nll"] for e in self._of(tier) if e["role"] == role]
                best = min((loss for loss in losses if loss is not None), default=None)
                if best is not None:
                    ours[role] = _perplexity(best)
        if ours:
            found[_FOUND] = ours
        return {name: found[name] for name in ("none", *_CLOSED_FORMS, _FOUND) if name in found}

    def lambdas(self, entry: Mapping[str, Any]) -> np.ndarray:
        """Return the lambdas of a candidate, counted from the base."""
        lambdas = np.array(entry.get("hundredths", ()), float) / 100
        if self.stage is not None and not entry.get("from_base"):
            lambdas = self.stage * lambdas
        return lambdas

    def _is_chosen(self, entry: Mapping[str, Any]) -> bool:
        if self.factors is None or entry.get("hundredths") is None:
            return False
        factor = entry.get("attention_factor")
        return (
            np.array_equal(self.lambdas(entry), self.factors.lambdas)
            and entry["start_tokens"] == self.factors.start_tokens
            and (factor is None or factor == self.factors.attention_factor)
        )

    def settings(self) -> list[tuple[str, str]]:
        """Return what the search was asked to do, defaults that were left alone included."""
        asked: dict[str, Any] = {}
        if (self.out / CONFIG).is_file():
            config = json_object(self.out / CONFIG)
            asked = {"model": times.place(config.get("model_name") or "unnamed")}
            asked |= {k: v for k, v in (config.get("options") or {}).items() if v is not None}
        asked |= {"hash of the weights": self.header["model"]}
        asked |= {f"hash of the {role} text": v for role, v in self.header["data"].items()}
        return flat(asked)

    # --- what is shown ------------------------------------------------------------------------

    def perplexity_sections(self, shown: str) -> list[Section]:
        """Return what was reached, how the search went, and what it does not say."""
        reached = Section("Perplexity", tables=self._tables())
        if self.ladder:
            reached.paragraphs.append(
                "Each tier was measured on its own range of positions, behind the tiers below it."
            )
        if not reached.tables:
            reached.paragraphs.append("Nothing was measured yet.")
        rest = Section(
            "By position, on text that no search has seen",
            ["A search measures whole windows, and chooses by them. For the perplexity by position "
             "beside the model as loaded, PI, NTK and YaRN, and for passkey retrieval, give it "
             "other text; the second command puts the figures into this report."],
            commands=[Command(self._evaluate(shown)), Command(f"longrope report {shown}")],
        )  # fmt: skip
        nested = (self.out / "evaluation" / JOURNAL).is_file()
        return [reached, *self.convergence_sections(), *([] if nested else [rest])]

    def _evaluate(self, shown: str) -> str:
        original, target = self.problem["original_length"], self.problem["target_length"]
        lengths = [original]
        while 2 * lengths[-1] < target:
            lengths.append(2 * lengths[-1])
        lengths.append(target)
        file = TIERS if self.ladder else FACTORS
        return (
            f"longrope evaluate MODEL UNSEEN --lengths {','.join(map(str, lengths))} "
            f"--factors {shown}/{file} --baselines pi,ntk,yarn --ladder --out {shown}/evaluation"
        )

    def _tables(self) -> list[Table]:
        if self.ladder:
            return self._ladder_tables()
        values = self.by_set()
        roles = [role for role in _WINDOWS if any(role in row for row in values.values())]
        if not values:
            return []
        rows = [[label(name), *(row.get(role) for role in roles)] for name, row in values.items()]
        head = ["perplexity of whole windows", *(_WINDOWS[role] for role in roles)]
        return [Table(head, rows, best=-1, digits=3)]

    def _ladder_tables(self) -> list[Table]:
        role, ends = self.deciding, self.ladder["targets"]
        columns = []
        for number in range(1, len(ends) + 1):
            losses = [e["nll"] for e in self._of(number) if e["role"] == role]
            best = min((loss for loss in losses if loss is not None), default=None)
            reached: dict[str, float | None] = dict(self.reached(number, role))
            columns.append(reached | {_FOUND: None if best is None else _perplexity(best)})
        names = [name for name in (*_CLOSED_FORMS, _FOUND) if any(name in c for c in columns)]
        rows = [[label(name), *(column.get(name) for column in columns)] for name in names]
        if not any(value is not None for row in rows for value in row[1:]):
            return []
        head = [f"perplexity of a tier's range, {_WINDOWS[role]}", *(f"to {end}" for end in ends)]
        return [Table(head, rows, best=-1, digits=3)]

    def convergence_sections(self) -> list[Section]:
        """Return the plots of how the search went; none where nothing was measured."""
        drawn = self.convergence("search")
        if drawn is None:
            return []
        words = "Each point is a candidate on the same windows."
        if any(entry["role"] in ("gradient", "screen") for entry in self.entries):
            words += (
                " Candidates on the first windows and steps of the descent, which go by other "
                "windows, are not shown."
            )
        return [Section("Convergence", [words], [drawn])]

    def convergence(self, name: str, title: str = "") -> Figure | None:
        """Return the plot of how the search went, a panel for each tier."""
        tiers = [None]
        if self.ladder:
            tiers = list(range(1, len(self.ladder["targets"]) + 1))
        tiers = [t for t in tiers if any(math.isfinite(v) for _, v in self.measured(t))]
        if not tiers:
            return None

        def panel(number: int, axes: Any) -> None:
            tier = tiers[number]
            reached = self.reached(tier, "search")
            levels = {n: v for n, v in reached.items() if n in self.drawn(tier)}
            if self.loaded.get("search") is not None and tier is None:
                levels["none"] = self.loaded["search"]
            figures.draw_convergence(axes, self.measured(tier), levels)
            if tier is not None:
                text = f"tier to {figures.short(self.ladder['targets'][tier - 1])} tokens"
                above = axes.get_title(loc="left")
                axes.set_title(f"{text}\n{above}" if above else text)

        def draw(figure: Any) -> None:
            figures.panels(figure, len(tiers), panel)
            figures.legend(figure)

        caption = f"{title}Perplexity of candidates on the search windows, and the best so far."
        return Figure(name, caption, draw, figures.panels_size(len(tiers)))

    def factor_sections(self) -> list[Section]:
        """Return lambda by dimension, beside the rules and for every tier."""
        if self.factors is None:
            return []
        section = Section("Rescale factors", [
            "Lambda 1 leaves a pair of dimensions as it was trained; the ratio of the windows "
            "slows it down as far as PI does."
        ])  # fmt: skip
        lengths = {
            name: self.problem[name]
            for name in ("original_length", "target_length", "rope_theta", "rotary_dim")
        }
        stage = np.ones(len(self.factors.lambdas.T)) if self.stage is None else self.stage
        sets = [(line("none", label="as loaded"), stage)]
        for name in self.drawn(self.last_tier):
            if name in _RULES:
                sets.append((line(name), getattr(RescaleFactors, name)(**lengths).lambdas))
                continue
            entry = next(e for e in self._of(self.last_tier) if e.get("origin") == name)
            sets.append((line(name), self.lambdas(entry)))
        sets.append((line("gradient", label=_FOUND), self.factors.lambdas))
        section.figures.append(lambda_figure("factors", sets))
        if self.tiers is not None and len(self.tiers) > 1:
            section.figures.append(tier_figure("tiers", self.tiers))
        return [section]

    def rows(self) -> list[Row]:
        """Return the lines of `results.csv`."""
        target = self.problem["target_length"]
        rows = [
            Row(f"perplexity, {_WINDOWS[role]}", label(name), 0, target, value)
            for name, by_role in self.by_set().items()
            for role, value in by_role.items()
            if not self.ladder
        ]
        for tier in [None] if not self.ladder else range(1, len(self.ladder["targets"]) + 1):
            name = _FOUND if tier is None else f"tier {tier}"
            rows += [
                Row("perplexity, search windows", f"candidate of {name}", None, number, value)
                for number, value in self.measured(tier)
            ]
        if self.tiers is not None:
            return rows + tier_rows(self.tiers)
        return rows if self.factors is None else rows + factor_rows(_FOUND, self.factors.lambdas)


def _perplexity(nll: float | None) -> float:
    return math.exp(nll) if nll is not None and nll < 700 else math.inf


def _perplexity_or_inf(value: float | None) -> float:
    return math.inf if value is None else value
