"""Every measure for the model as loaded and for several sets of factors, in one resumable run."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from longrope import report
from longrope._validation import choice, count, natural
from longrope.documents import as_documents
from longrope.documents.checks import Documents, like
from longrope.errors import NotFiniteError
from longrope.evaluation import suite_report
from longrope.evaluation.generation import check_generates
from longrope.evaluation.identity import digest, fingerprint
from longrope.evaluation.long_perplexity import long_perplexity
from longrope.evaluation.modes import vocabulary
from longrope.evaluation.passkey import check_passkey, passkey
from longrope.evaluation.perplexity import perplexity
from longrope.evaluation.prompts import PromptTokens, check_lengths
from longrope.evaluation.ruler import check_ruler, ruler
from longrope.evaluation.suite_report import AS_LOADED, Evaluation, Figure
from longrope.factors import RescaleFactors, Tiers
from longrope.factors.tiers import ranges_of
from longrope.patching import apply, remove, rope_settings
from longrope.patching.apply import factors_kept
from longrope.patching.wrappers import dtype_note
from longrope.report.evaluation import KIND
from longrope.runs.folder import JOURNAL, prepare, write_config
from longrope.runs.journal import Journal
from longrope.runs.progress import bar

TASKS = ("perplexity", "passkey", "ruler", "longppl")
#: What the journal has where a measure gives no figure.
_NOTHING = dict.fromkeys(("value", "low", "high", "n", "detail"))


def evaluate(
    model: nn.Module,
    documents: Iterable[Any],
    tokenizer: Any = None,
    *,
    lengths: Sequence[int],
    factors: Mapping[str, RescaleFactors | Tiers] | None = None,
    out: str | Path,
    tasks: Sequence[str] = ("perplexity", "passkey"),
    trials: int = 20,
    samples: int = 20,
    seed: int = 0,
    tiers: str = "position",
    bos: str | bool | int = "auto",
    resume: bool = True,
    progress: bool = False,
) -> Evaluation:
    """Measure a model as loaded, and under each set of factors, by several tasks and lengths.

    Every figure is durable before the next one is begun: a run that was killed resumes with the
    same call. Shorter lengths come first.

    Parameters
    ----------
    model
        A Hugging Face causal language model. Factors that are applied to it are taken out for the
        figures "as loaded", and are back in force afterwards.
    documents
        1-D token ids that no search has seen, for perplexity and LongPPL: at each length those that
        are long enough.
    tokenizer
        For passkey and RULER; None: the model reads bytes.
    lengths
        Windows and prompts, in tokens.
    factors
        By name, what `longrope.apply` takes.
    out
        The folder of the run: `journal.jsonl`, `evaluation.csv`, `evaluation.png`, with passkey
        `passkey.png`, and `report.html` with `results.csv` and plots.
    tasks
        Of `"perplexity"` (windows that do not overlap), `"passkey"`, `"ruler"` and `"longppl"`,
        whose key tokens are those of the first set of `factors` that has enough of them, for it
        and all sets after it (of the model as loaded only where no set has); nothing at lengths
        within the original window.
    trials
        Passkey prompts of each length.
    samples
        RULER prompts of each task and length.
    seed
        Of all random choices.
    tiers, bos
        As in `longrope.apply` and `longrope.perplexity`.
    resume
        Whether an earlier run in the folder goes on; False moves it aside.
    progress
        Show a progress bar with the time left on standard error.

    Returns
    -------
    Evaluation
        `print(result)` shows the table; `.figures` holds every figure.

    Raises
    ------
    ValueError
        If an argument is out of range, no document is long enough, the folder holds another run,
        or a task refuses (see `longrope.passkey` and so on).
    """
    check_generates(model)
    asked = check_arguments(
        lengths=lengths, tasks=tasks, tiers=tiers, trials=trials, samples=samples, seed=seed
    )
    wanted, tasks = asked["lengths"], asked["tasks"]
    sets: dict[str, Any] = {AS_LOADED: None, **(factors or {})}
    if factors and AS_LOADED in factors:
        raise ValueError(f"factors: expected names other than {AS_LOADED!r}")
    if {"passkey", "ruler"} & set(tasks):
        tokens = PromptTokens(tokenizer, model, bos)
        if "passkey" in tasks:
            check_passkey(tokens, wanted[0])
        if "ruler" in tasks:
            check_ruler(tokens, wanted[0])
    reads = {"perplexity", "longppl"} & set(tasks)
    texts = _texts(model, documents, wanted[-1]) if reads else []
    with factors_kept(model):
        remove(model)
        header = {
            **asked, "bos": bos, "sets": list(sets),
            "factors": {name: _fields(each) for name, each in sets.items()},
            "model": fingerprint(model), "documents": [digest(text) for text in texts],
        }  # fmt: skip
        folder = prepare(out, KIND, suite_report.FILES, resume)
        with Journal(folder / JOURNAL, header, dtype_note(model), kind=KIND) as journal:
            write_config(folder, header)
            figures = _figures(journal, model, texts, tokenizer, sets, header, progress)
    result = Evaluation(tuple(figures))
    result.save(folder)
    report.at_end(folder)
    return result


def check_arguments(
    *,
    lengths: Sequence[int],
    tasks: Sequence[str],
    tiers: str,
    trials: int,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Return these arguments of `evaluate`, lengths and tasks each once; no model is needed.

    `ValueError` for one that is out of range.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Iterable) or not tasks:
        raise ValueError(f"tasks: expected names of {', '.join(TASKS)}, got {tasks!r}")
    choice("tiers", tiers, ("position", "row"))
    return {
        "tasks": tuple(dict.fromkeys(choice("tasks", task, TASKS) for task in tasks)),
        "lengths": check_lengths(lengths),
        "tiers": tiers,
        "trials": count("trials", trials),
        "samples": count("samples", samples),
        "seed": natural("seed", seed),
    }


def _texts(model: nn.Module, documents: Iterable[Any], longest: int) -> list[Any]:
    given = documents if isinstance(documents, Documents) else list(documents)
    texts = as_documents(given, vocab_size=vocabulary(model))
    most = max(map(len, texts))
    if most < longest:
        raise ValueError(
            f"lengths: expected at most {most}, the tokens of the longest document, got {longest}"
        )
    return like(given, texts)


def _fields(factors: RescaleFactors | Tiers | None) -> Any:
    if factors is None:
        return None
    each = [factors] if isinstance(factors, RescaleFactors) else factors
    fields = [one.as_fields() for one in each]
    for one in fields:
        one["lambdas"] = [str(value) for value in one["lambdas"]]  # JSON has no infinity
    return fields


def _figures(
    journal: Journal,
    model: nn.Module,
    texts: Any,
    tokenizer: Any,
    sets: Mapping[str, Any],
    header: Mapping[str, Any],
    progress: bool,
) -> list[Figure]:
    """Return all figures, those of the journal and then those that are measured now."""
    units = [
        (length, task, name)
        for length, task in itertools.product(header["lengths"], header["tasks"])
        for name in _order(sets, task)
    ]
    # In units of the tokens that go through the model, roughly: what the time left is read from.
    costs = {"perplexity": 10, "longppl": 20, "passkey": header["trials"],
             "ruler": 6 * header["samples"]}  # fmt: skip
    figures: list[Figure] = []
    keys: dict[int, Any] = {}
    total = sum(length * costs[task] for length, task, _ in units)
    with bar(total, "now", shown=progress) as update:
        for length, task, name in units:
            cost = length * costs[task]
            if journal.pending:
                (entry,) = journal.peek(1)
                entry = {key: value for key, value in entry.items() if key != "checksum"}
                journal.skip(1)
                computed = 0
            else:
                update(0, 0, f"{task} {length} {name}")
                with _applied(model, sets[name], header["tiers"]):
                    try:
                        entry = _measure(model, texts, tokenizer, task, length, header, keys)
                    except NotFiniteError:
                        if sets[name] is None:
                            raise  # the model's own fault, not that of factors
                        entry = _NOTHING | {"detail": []}
                entry = {"task": task, "length": length, "set": name, **entry}
                journal.append([entry])
                computed = cost
            if task == "longppl" and entry["detail"]:
                keys.setdefault(length, entry["detail"])
            figures.append(Figure.of(entry))
            update(cost, computed, None)
    return figures


def _order(sets: Mapping[str, Any], task: str) -> list[str]:
    """Return the names of the sets in the order in which a task measures them.

    For LongPPL the model as loaded comes last: beyond its window it must not say which tokens are
    key while any set of factors can.
    """
    names = list(sets)
    if task == "longppl":
        return [*names[1:], names[0]]
    return names if len(names) == 1 else [names[1], names[0], *names[2:]]


@contextlib.contextmanager
def _applied(model: nn.Module, factors: Any, tiers: str) -> Iterator[None]:
    if factors is not None:
        apply(model, factors, tiers)
    try:
        yield
    finally:
        remove(model)


def _doublings(window: int, length: int) -> list[tuple[int, int]]:
    """Return ranges of positions: the original window, up to twice that, and so on to `length`."""
    return list(ranges_of(window, length)) if window < length else [(0, length)]


def _measure(
    model: nn.Module,
    texts: Any,
    tokenizer: Any,
    task: str,
    length: int,
    asked: Mapping[str, Any],
    keys: Mapping[int, Any],
) -> dict[str, Any]:
    """Return the value, the ends of its interval, what it is a mean of, and details, for JSON."""
    seed, bos = asked["seed"], asked["bos"]
    if task == "passkey":
        ask = {"lengths": [length], "trials": asked["trials"], "seed": seed, "bos": bos}
        found = passkey(model, tokenizer, **ask)
        right = found.accuracy(length)
        return {
            "value": right.share, "low": right.low, "high": right.high, "n": right.trials,
            "detail": [list(trial) for trial in found.trials],
        }  # fmt: skip
    if task == "ruler":
        ask = {"lengths": [length], "samples": asked["samples"], "seed": seed, "bos": bos}
        scores = ruler(model, tokenizer, **ask)
        mean = scores.average(length)
        return {
            "value": mean.mean, "low": mean.low, "high": mean.high, "n": mean.samples,
            "detail": {name: scores.score(name, length).mean for name in scores.tasks},
        }  # fmt: skip
    long_enough = like(texts, [text for text in texts if len(text) >= length])
    if task == "perplexity":
        ranges = _doublings(rope_settings(model).original_length, length)
        value = perplexity(
            model, long_enough, length=length, stride=length, bos=bos, ranges=ranges
        )  # fmt: skip
        parts = [[*pair, _finite(part)] for pair, part in zip(ranges, value.by_range, strict=True)]
        return {
            "value": _finite(value), "low": None, "high": None, "n": value.tokens, "detail": parts,
        }  # fmt: skip
    if length <= rope_settings(model).original_length + 1:
        return _NOTHING
    try:
        value = long_perplexity(
            model, long_enough, length=length, bos=bos, seed=seed, keys=keys.get(length)
        )
    except ValueError as error:
        if "key tokens" not in str(error):
            raise
        return _NOTHING
    low, high = map(_finite, value.interval)
    return {
        "value": _finite(value), "low": low, "high": high, "n": value.key_tokens,
        "detail": [list(places) for places in value.keys],
    }  # fmt: skip


def _finite(value: float) -> float | None:
    """Return a figure for the journal; None where there is no finite one."""
    return float(value) if math.isfinite(value) else None
