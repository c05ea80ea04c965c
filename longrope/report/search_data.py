"""A search as its folder holds it: the journal, and the results once they are there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope._numbers import perplexity_of
from longrope.factors import RescaleFactors, Tiers
from longrope.report.parts import flat, json_object
from longrope.runs import journal, times
from longrope.runs.folder import CONFIG, JOURNAL
from longrope.runs.style import METHODS, STYLES

KIND = "search"
FACTORS, TIERS, SUMMARY = "factors.json", "tiers.json", "summary.json"
#: What windows are for, as the journal says it, in words.
WINDOWS = {"screen": "first windows", "search": "search windows", "validation": "held-out windows"}
#: Factors that need no search, by their origin in the journal; the first three are always drawn.
RULES = ("pi", "ntk", "yarn")
CLOSED_FORMS = (*RULES, *(n for n in STYLES if n not in (*RULES, "none", *METHODS)))
#: The origin of YaRN behind tiers of YaRN, with which a ladder is compared.
YARN_LADDER = "yarn by position"
#: The names of what was found, and of the best candidate where nothing says what that is.
FOUND, BEST = "searched", "best so far"


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
        self.found: Mapping[str, float | None] = summary.get("found", {})
        self.loaded: Mapping[str, float | None] = summary.get("as_loaded", {})
        self.finished = is_finished(out)
        stage = self.problem.get("stage")
        self.stage = np.array(list(map(float, stage["lambdas"]))) if stage else None

    @classmethod
    def read(cls, out: Path) -> Search:
        """Read a folder; `JournalError` or `ValueError` in one sentence where it is damaged."""
        header, entries = journal.read(out / JOURNAL)
        return cls(header, entries, out)

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
            (number, perplexity_of(entry["nll"]))
            for number, entry in enumerate(self.of(tier), 1)
            if entry["role"] == "search" and entry.get("origin") != YARN_LADDER
        ]

    def of(self, tier: int | None) -> list[Mapping[str, Any]]:
        """Return the entries of a tier; None: of a search of one set."""
        return [entry for entry in self.entries if entry.get("tier") == tier]

    def reached(self, tier: int | None, role: str) -> dict[str, float]:
        """Return the perplexity of each rule on the windows of a role."""
        return {
            entry["origin"]: perplexity_of(entry["nll"])
            for entry in self.of(tier)
            if entry["role"] == role and entry.get("origin") in CLOSED_FORMS
        }

    def drawn(self, tier: int | None) -> list[str]:
        """Return the closed forms to draw: PI, NTK, YaRN, and the best where it is another."""
        reached = self.reached(tier, "search") or self.reached(tier, "screen")
        best = [min(reached, key=lambda name: reached[name])] if reached else []
        return list(dict.fromkeys([*RULES, *best]))

    def by_set(self) -> dict[str, dict[str, float]]:
        """Return perplexities by the name of a style, `FOUND` or `BEST`, and role."""
        tier, found = self.last_tier, {}
        if any(value is not None for value in self.loaded.values()):
            found["none"] = {role: math.inf if v is None else v for role, v in self.loaded.items()}
        for role in WINDOWS:
            for name, value in self.reached(tier, role).items():
                found.setdefault(name, {})[role] = value
        if self.found:
            found[FOUND] = {role: v for role, v in self.found.items() if v is not None}
            return self._ordered(found)
        for role in ("search", "validation"):
            losses = [e["nll"] for e in self.of(tier) if e["role"] == role]
            best = min((loss for loss in losses if loss is not None), default=None)
            if best is not None:
                found.setdefault(BEST, {})[role] = perplexity_of(best)
        return self._ordered(found)

    @staticmethod
    def _ordered(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        return {n: found[n] for n in ("none", *CLOSED_FORMS, FOUND, BEST) if n in found}

    def lambdas(self, entry: Mapping[str, Any]) -> np.ndarray:
        """Return the lambdas of a candidate, counted from the base."""
        lambdas = np.array(entry.get("hundredths", ()), float) / 100
        if self.stage is not None and not entry.get("from_base"):
            lambdas = self.stage * lambdas
        return lambdas

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


def is_finished(out: Path) -> bool:
    """Say whether a search has ended, and none has gone on in its folder since.

    One by layer or head, or of more iterations, goes on from the results of a finished one, which
    stay until its own are there. The summary says of which journal results are; in older folders it
    does not.
    """
    if not (out / FACTORS).is_file():
        return False
    summary = json_object(out / SUMMARY) if (out / SUMMARY).is_file() else {}
    return summary.get("journal") in (None, journal.state(out / JOURNAL))
