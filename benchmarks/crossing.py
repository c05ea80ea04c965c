"""What a crossing costs: rules of choosing factors, cuts of the prefill, and two designs of cache.

`python benchmarks/crossing.py --save` measures the packaged model (window 256, target 2048);
`--model FOLDER --data TEXT --target N` another one. Three tables, appended to
`results/crossing.csv`:

* `perplexity`: by range of positions, for the model as loaded, one set of factors for every
  position, tiers by row and tiers by position, with YaRN's factors and searched ones.
* `crossing`: a text fed in 1, 3 and random pieces after a prefill that ends inside the original
  window. For tiers by position, tiers by row, and a cache as transformers keeps it where the
  frequencies switch (stale keys): how far the logits are from those of one prefill of the whole
  (largest difference), the perplexity of the second half, and the time; beside it what a full
  prefill at every crossing costs (`re-prefill`).
* `cache`: time of a prefill and of a token beyond the window, and bytes of the cache, for keys kept
  turned and un-rotated, one set of factors, and the model without factors.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import torch
from transformers import DynamicCache

import longrope
from longrope.demo import run as demo
from longrope.factors.tiers import ladder_targets

FIELDS = ["table", "model", "factors", "rule", "case", "measure", "value", *harness.WHERE]
SEED = 0


class Rows(list):
    """Rows of the result, printed as they come."""

    def __init__(self, model_name: str):
        super().__init__()
        self.same = {"model": model_name, **harness.where()}

    def put(self, table: str, factors: str, rule: str, case: str, measure: str, value: float):
        """Add a row."""
        self.append(self.same | {"table": table, "factors": factors, "rule": rule, "case": case,
                                 "measure": measure, "value": f"{value:.6g}"})  # fmt: skip
        cells = f"{table:11s} {factors:9s} {rule:22s} {case:16s} {measure:22s}"
        print(cells, f"{value:.5g}", flush=True)

    def save(self):
        """Append the rows to the results, and forget them."""
        harness.append(self, harness.RESULTS / "crossing.csv", FIELDS)
        self.clear()


def rules(model, factors) -> dict[str, Callable[[], object]]:
    """Return what applies each rule of choosing factors to the model."""
    loaded = longrope.rope_settings(model).loaded
    ladder = factors.ladder(loaded=loaded)
    return {
        "as loaded": lambda: longrope.remove(model),
        "one set": lambda: longrope.apply(model, factors),
        "tiers by row": lambda: longrope.apply(model, ladder, "row"),
        "tiers by position": lambda: longrope.apply(model, ladder),
    }


def perplexities(rows: Rows, model, sets: dict, documents, target: int) -> None:
    """Measure every rule by range of positions."""
    window = longrope.rope_settings(model).loaded_length
    ranges = list(itertools.pairwise([1, window, *ladder_targets(window, target)]))
    for name, factors in sets.items():
        for rule, use in rules(model, factors).items():
            if rule == "as loaded" and name != "YaRN":
                continue
            use()
            value = longrope.perplexity(
                model, documents, length=target, stride=target, ranges=ranges
            )
            shown = "none" if rule == "as loaded" else name
            for (begin, end), part in zip(ranges, value.by_range, strict=True):
                rows.put("perplexity", shown, rule, f"{begin}-{end - 1}", "perplexity", part)
            rows.put("perplexity", shown, rule, "all", "perplexity", value)


def pieces(start: int, end: int) -> dict[str, list[int]]:
    """Return sizes of what follows the first prefill, in several cuts."""
    random = np.random.default_rng(SEED)
    rest = end - start
    cuts = sorted(random.choice(np.arange(1, rest), 9, replace=False).tolist())
    return {
        "1 piece": [rest],
        "3 pieces": [rest // 3, rest // 3, rest - 2 * (rest // 3)],
        "10 random pieces": [b - a for a, b in zip([0, *cuts], [*cuts, rest], strict=True)],
    }


@torch.no_grad()
def fed(model, ids, start: int, sizes: list[int]) -> torch.Tensor:
    """Return the logits of a text that comes as a prefill of `start` tokens and pieces."""
    cache, at, parts = DynamicCache(config=model.config), 0, []
    for size in (start, *sizes):
        out = model(ids[:, at : at + size], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + size
        parts.append(out.logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def stale(model, factors, ids, start: int, sizes: list[int]) -> torch.Tensor:
    """Feed the text as transformers' longrope does for Llama: the whole pass takes the set of its
    longest position, and keys in the cache stay as they were turned."""
    plain = longrope.rope_settings(model).loaded
    cache, at, parts = DynamicCache(config=model.config), 0, []
    window = plain.target_length
    for size in (start, *sizes):
        one = factors if at + size > window else plain
        with longrope.patching.rows(
            model, torch.from_numpy(one.inv_freq()), one.start_tokens, one.attention_factor
        ):
            out = model(ids[:, at : at + size], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + size
        parts.append(out.logits)
    return torch.cat(parts, 1)


def perplexity_of(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the perplexity of the tokens that logits predict, after the first half."""
    half = ids.shape[1] // 2
    loss = torch.nn.functional.cross_entropy(logits[0, half:-1].double(), ids[0, half + 1 :])
    return float(loss.exp())


def crossings(rows: Rows, model, factors, ids, name: str) -> None:
    """Feed a text across every crossing."""
    window = longrope.rope_settings(model).loaded_length
    start, end = window // 2, ids.shape[1]
    for rule, use in rules(model, factors).items():
        if rule == "one set":
            continue
        use()
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
        rows.put("crossing", name, rule, "one prefill", "perplexity, 2nd half",
                 perplexity_of(whole, ids))  # fmt: skip
        for case, sizes in pieces(start, end).items():
            began = time.process_time()
            logits = fed(model, ids, start, sizes)
            took = time.process_time() - began
            error = float((logits - whole).abs().max())
            rows.put("crossing", name, rule, case, "largest difference", error)
            rows.put("crossing", name, rule, case, "perplexity, 2nd half",
                     perplexity_of(logits, ids))  # fmt: skip
            rows.put("crossing", name, rule, case, "milliseconds", 1e3 * took)
    longrope.apply(model, factors)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    longrope.remove(model)
    for case, sizes in pieces(start, end).items():
        logits = stale(model, factors, ids, start, sizes)
        error = float((logits[:, end // 2 :] - whole[:, end // 2 :]).abs().max())
        rows.put("crossing", name, "stale cache", case, "largest difference", error)
        rows.put("crossing", name, "stale cache", case, "perplexity, 2nd half",
                 perplexity_of(logits, ids))  # fmt: skip
    longrope.apply(model, factors)
    began = time.process_time()
    with torch.no_grad():
        crossed, limit = 0, window
        while limit < end:  # every crossing computes everything before it again
            model(ids[:, :limit], use_cache=True, logits_to_keep=1)
            crossed, limit = crossed + limit, 2 * limit
    rows.put("crossing", name, "re-prefill", f"{crossed} tokens more", "milliseconds",
             1e3 * (time.process_time() - began))  # fmt: skip


@torch.no_grad()
def caches(rows: Rows, model, factors, ids, name: str, rounds: int) -> None:
    """Time a prefill and single tokens, in turns, and weigh the cache."""
    ladder = factors.ladder(loaded=longrope.rope_settings(model).loaded)
    designs = {
        "without factors": lambda: longrope.remove(model),
        "one set": lambda: longrope.apply(model, factors),
        "position, turned": lambda: longrope.apply(model, ladder),
        "position, un-rotated": lambda: longrope.apply(model, ladder, cached_keys="unrotated"),
    }
    window = longrope.rope_settings(model).loaded_length
    places = {"in the window": window // 2, "at the target": ids.shape[1] - 40}
    times: dict = {}
    for _ in range(rounds):
        for design, use in designs.items():
            use()
            for place, tokens in places.items():
                began = time.process_time()
                out = model(ids[:, :tokens], use_cache=True, logits_to_keep=1)
                times.setdefault((design, place, "prefill, ms"), []).append(
                    1e3 * (time.process_time() - began)
                )
                cache = out.past_key_values
                began = time.process_time()
                for at in range(tokens, tokens + 32):
                    model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                times.setdefault((design, place, "ms a token"), []).append(
                    1e3 * (time.process_time() - began) / 32
                )
                held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
                held += [layer.positions for layer in cache.layers if hasattr(layer, "positions")]
                size = sum(t.numel() * t.element_size() for t in held)
                times.setdefault((design, place, "cache, bytes"), []).append(size)
    for (design, place, measure), values in times.items():
        rows.put("cache", name, design, place, measure, statistics.median(values))
    first = times["without factors", "in the window", "ms a token"]
    ours = times["position, turned", "in the window", "ms a token"]
    rows.put("cache", name, "position, turned", "in the window", "time / without factors",
             statistics.median(b / a for a, b in zip(first, ours, strict=True)))  # fmt: skip
    for measure in ("prefill, ms", "ms a token"):
        one = times["one set", "at the target", measure]
        for design in ("position, turned", "position, un-rotated"):
            ratio = statistics.median(
                b / a for a, b in zip(one, times[design, "at the target", measure], strict=True)
            )
            rows.put("cache", name, design, "at the target", f"{measure} / one set", ratio)
    longrope.remove(model)


def main() -> None:
    """Measure and, if asked, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder; default: the packaged model")
    parser.add_argument("--data", type=Path, help="text that the model and no search has seen")
    parser.add_argument("--target", type=int, default=2048, help="window to reach, in tokens")
    parser.add_argument("--factors", type=Path, help="searched factors; default: a short search")
    parser.add_argument("--excerpts", type=int, default=24, help="windows to measure")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--only", choices=["perplexity", "crossing", "cache"])
    parser.add_argument("--save", action="store_true", help="append rows to results/crossing.csv")
    args = parser.parse_args()
    if args.model is None:
        model, documents = demo.load_packaged_model(), demo.excerpts("test", args.excerpts, SEED)
        searched = demo.corpus.documents("search", min_length=args.target)
    else:
        from longrope.cli.inputs import load_model

        model, tokenizer = load_model(str(args.model), "cpu")
        texts = longrope.load_data(args.data, tokenizer=tokenizer)
        documents = [d[: args.target] for d in texts if len(d) >= args.target][: args.excerpts]
        searched = None
    rows = Rows("packaged" if args.model is None else args.model.name)
    lengths = longrope.rope_settings(model).lengths(args.target)
    sets = {"YaRN": longrope.RescaleFactors.yarn(**lengths)}
    if args.factors is not None:
        sets["searched"] = longrope.RescaleFactors.load(args.factors)
    elif searched is not None:
        sets["searched"] = longrope.search(
            model, searched, target_length=args.target, method="gradient", steps=40, samples=4,
            seed=SEED, progress=False,
        ).factors  # fmt: skip
    best = sets.get("searched", sets["YaRN"])
    name = "searched" if "searched" in sets else "YaRN"
    ids = torch.as_tensor(np.asarray(documents[0][: args.target]), dtype=torch.int64)[None]
    tables = {
        "perplexity": lambda: perplexities(rows, model, sets, documents, args.target),
        "crossing": lambda: crossings(rows, model, best, ids, name),
        "cache": lambda: caches(rows, model, best, ids, name, args.rounds),
    }
    for table, measure in tables.items():
        if args.only in (None, table):
            measure()
            if args.save:
                rows.save()


if __name__ == "__main__":
    main()
