"""Small folders of runs of every kind: a real search and evaluation, the others put together."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np

import longrope
from longrope import RescaleFactors, Tiers, report
from longrope.extension import folder as extension
from longrope.runs import times
from longrope.runs.journal import Journal
from support.tiny_search import SMALL, build_documents, build_model

#: Of the model of `tiny_search`.
LENGTHS = {"original_length": 16, "rope_theta": 10000.0, "rotary_dim": 16}


KINDS = ("search", "evaluation", "passkey", "recovery", "extension", "demo")


def all_kinds(root: Path) -> dict[str, Path]:
    """Make a folder of every kind of run, by its name, with its report."""
    searched = search(root / "search")
    made = {
        "search": searched,
        "evaluation": evaluation(root / "evaluation"),
        "passkey": passkey(root / "passkey"),
        "recovery": recovery(root / "recovery"),
        "extension": extended(root / "extension", searched),
        "demo": demo(root / "demo", searched),
    }
    for kind in KINDS[2:]:  # the others wrote their own
        report.write(made[kind])
    return made


def search(out: Path, **changes) -> Path:
    """Search for a moment, in `out`."""
    longrope.search(build_model(), build_documents(), out=out, **SMALL | changes)
    return out


def evaluation(out: Path) -> Path:
    """Evaluate the model as loaded, YaRN and a set with a name that HTML must not take as its own.

    Without passkey, whose prompt is longer than what the tiny model reads in a moment.
    """
    yarn = RescaleFactors.yarn(**LENGTHS, target_length=64)
    sets = {"yarn": yarn, "<script>alert(1)</script>": yarn.ladder()}
    longrope.evaluate(
        build_model(), build_documents(), out=out, lengths=[16, 32, 64], tasks=["perplexity"],
        factors=sets,
    )  # fmt: skip
    return out


def passkey(out: Path) -> Path:
    """Write the trials of a passkey measurement, as the command does."""
    out.mkdir(parents=True)
    random = np.random.default_rng(0)
    with (out / "passkey.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["length", "tokens", "depth", "key", "right", "nll"])
        for length in (1024, 2048, 4096, 16384):
            for trial in range(20):
                right = int(random.random() < 1.1 - length / 16384)
                depth = (trial % 10 + random.random()) / 10
                writer.writerow([length, length, f"{depth:.4f}", "12345", right, "0.5"])
    (out / "passkey.json").write_text(json.dumps({"model": "m", "seed": 0}))
    return out


def recovery(out: Path) -> Path:
    """Put together the folder of a recovery."""
    out.mkdir(parents=True)
    header = {"lengths": [16], "steps": 2, "samples": 1, "max_lambda": None, "seed": 0}
    with Journal(out / "journal.jsonl", header, kind="recovery") as journal:
        journal.append([{"value": [3.0, 2.5]}])
    (out / "recovery.md").write_text(
        "| perplexity of windows of | 16 |\n| --- | ---: |\n"
        "| the original model | 12.500 |\n| recovered, by position | 12.750 |\n"
    )
    _tiers().save(out / "tiers.json")
    return out


def extended(out: Path, searched: Path, stages: int = 3) -> Path:
    """Put together the folder of an extension of three stages, of which so many are done.

    `searched` is the folder of a search, which becomes that of the first stage.
    """
    plan = {
        "target_length": 64, "window": 16, "seed": 0,
        "stages": {
            "search-1": {"number": 1, "kind": "search", "name": "search-1", "length": 32,
                         "tiers": "position", "options": {"seed": 0}},
            "finetune-2": {"number": 2, "kind": "finetune", "name": "finetune-2", "length": 64,
                           "config": {"steps": 30, "learning_rate": 1e-3}},
            "recover-3": {"number": 3, "kind": "recover", "name": "recover-3", "lengths": [16],
                          "options": {"steps": 2}},
        },
    }  # fmt: skip
    out.mkdir(parents=True)
    names = ["the model as it was", *plan["stages"]]
    with Journal(out / "journal.jsonl", {"plan": plan}, kind=extension.KIND) as journal:
        for number, name in enumerate(names[: stages + 1]):
            values = [9.0 + number / 5, 14 - 4 * min(number, 1) - number / 9, 40 / (1 + number)]
            row = {"name": name, "by_range": values, "overall": sum(values) / 3}
            journal.append([{"stage": name, "row": row}])
        if stages == 3:
            journal.append([{"stage": extension.EXPORT}])
    shutil.copytree(searched, out / "stages" / "01-search-1" / "search")
    _tiers().save(out / "stages" / "01-search-1" / "tiers.json")
    if stages > 1:
        trained = out / "stages" / "02-finetune-2"
        trained.mkdir()
        random = np.random.default_rng(0)
        rows = [f"{n},{3 - n / 20 + random.random() / 4:.4f},1.0,0.001" for n in range(1, 31)]
        (trained / "losses.csv").write_text(
            "\n".join(["step,loss,grad_norm,learning_rate", *rows, ""])
        )
    times.began(out)
    return out


def demo(out: Path, searched: Path, finished: bool = True) -> Path:
    """Put together the folder of a demo around a search."""
    shutil.copytree(searched, out / "search-evolution")
    if finished:
        _tiers().save(out / "tiers.json")
        (out / "perplexity.csv").write_text(
            "method,16,32\nnone,2.8,9.3\nPI,24.9,28.8\nNTK,3.1,4.4\nYaRN,3.3,3.05\n"
            '"LongRoPE, Algorithm 1",3.2,2.97\n"LongRoPE, by position",2.8,2.68\n'
        )
    return out


def _tiers() -> Tiers:
    return RescaleFactors.yarn(**LENGTHS, target_length=64).ladder()
