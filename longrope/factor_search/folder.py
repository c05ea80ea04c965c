"""What a search leaves beside its journal: `factors.json`, `history.csv`, a report and so on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longrope import report
from longrope._numbers import perplexity_of
from longrope.factor_search.history import Role, SearchResult
from longrope.factor_search.space import STEPS
from longrope.factors import RescaleFactors
from longrope.report.search_data import FACTORS, KIND, SUMMARY, TIERS, is_finished
from longrope.runs import folder, journal
from longrope.runs.folder import JOURNAL, write_table, write_text

HISTORY, PLOT = "history.csv", "search.png"


def prepare(out: str | Path, resume: bool = True) -> Path:
    """Create or check the folder of a search, see `longrope.runs.folder.prepare`."""
    return folder.prepare(out, KIND, (FACTORS, HISTORY, PLOT, TIERS, SUMMARY), resume)


def write_results(out: Path, result: SearchResult) -> None:
    """Write the factors, the tiers of a ladder, the history as a table, and the report."""
    history, tiers = result.history, result.tiers
    if tiers is not None:
        tiers.save(out / TIERS)
    result.factors.save(out / FACTORS)
    names = [
        "role",
        *(["tier"] if tiers is not None else []),
        "iteration",
        "origin",
        "perplexity",
        "start_tokens",
        "attention_factor",
    ]
    lambdas = [f"lambda_{i}" for i in range(len(history[0].lambdas))]
    rows = [
        [number, *(getattr(e, name) for name in names), *e.lambdas]
        for number, e in enumerate(history)
    ]
    write_table(out / HISTORY, ["evaluation", *names, *lambdas], rows)
    found = {Role.SEARCH: result.perplexity, Role.VALIDATION: result.validation_perplexity}
    as_loaded = {e.role: e.perplexity for e in result.loaded}
    content = {
        "forward_passes": sum(e.forward_equivalents for e in history),
        "found": {role: _finite(value) for role, value in found.items()},
        "as_loaded": {role: _finite(value) for role, value in as_loaded.items()},
        "journal": journal.state(out / JOURNAL),
    }
    write_text(out / SUMMARY, json.dumps(content, indent=1) + "\n")
    report.at_end(out)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def summary(out: Path) -> dict[str, Any]:
    """Return what a folder holds, in words: what the search was asked for and how far it is.

    Raises `ValueError` where its journal is not that of a search.
    """
    if not journal.is_begun(out / JOURNAL, KIND):
        raise ValueError(f"{str(out / JOURNAL)!r}: expected the journal of a search that has begun")
    header, entries = journal.read(out / JOURNAL)
    problem = header["problem"]
    steps = sum(entry["role"] == Role.GRADIENT for entry in entries)
    facts = {
        "search": header["method"],
        "objective": header["objective"],
        "original length": problem["original_length"],
        "target length": problem["target_length"],
        "seed": header["seed"],
        "measured": f"{len(entries) - steps} candidates on windows, {steps} steps",
        "state": "finished" if is_finished(out) else "not finished; the same command resumes",
    }
    if header.get("ladder"):
        ends = ", ".join(str(end) for end in header["ladder"]["targets"])
        facts["ladder"] = f"tiers up to {ends} tokens; the figures are of the last one begun"
        last = max((entry["tier"] for entry in entries), default=1)
        entries = [entry for entry in entries if entry["tier"] == last]
    entries = [entry for entry in entries if "heads" not in entry]
    chosen = RescaleFactors.load(out / FACTORS) if (out / FACTORS).exists() else None
    stage = problem.get("stage")
    if stage is not None:  # an infinite lambda is "inf" there
        stage = RescaleFactors(**stage | {"lambdas": list(map(float, stage["lambdas"]))})
    for role, name in ((Role.SEARCH, "search windows"), (Role.VALIDATION, "held-out windows")):
        found = [e for e in entries if e["role"] == role and e["nll"] is not None]
        if found:
            best = min(found, key=lambda e: e["nll"])
            yarn = [e["nll"] for e in found if e["origin"] == "yarn"]
            compared = f", {perplexity_of(yarn[0]):.4f} with YaRN" if yarn else ""
            # A margin may have kept another point than the best.
            kept = [e for e in found if chosen is not None and _is(e, chosen, stage)]
            if kept and kept[-1]["nll"] > best["nll"]:
                compared += f", {perplexity_of(best['nll']):.4f} at best"
            shown, what = (kept[-1], "chosen, on") if kept else (best, "best on")
            facts[f"{what} the {name}"] = f"perplexity {perplexity_of(shown['nll']):.4f}{compared}"
    return facts


def _is(entry: Mapping[str, Any], factors: RescaleFactors, stage: RescaleFactors | None) -> bool:
    """Say whether an entry of the journal, on top of a stage, has measured these factors."""
    own = entry["attention_factor"]  # None: that of the search
    lambdas = np.array(entry["hundredths"]) / STEPS
    if stage is not None and not entry.get("from_base"):
        lambdas = stage.lambdas * lambdas
    return (
        np.array_equal(lambdas, factors.lambdas)
        and entry["start_tokens"] == factors.start_tokens
        and (own is None or own == factors.attention_factor)
    )
