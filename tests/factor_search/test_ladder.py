"""`longrope.search(ladder=True)`: tiers, each for its own range; cost, resuming, bad input."""

import dataclasses
import itertools
import json
import math
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from support import families, tiny_models
from support.processes import environment
from support.threads import threads
from support.tiny_search import SIZES, build_documents, build_model

import longrope
from longrope import RescaleFactors, Tiers
from longrope.factor_search import folder, ladder, range_evaluator
from longrope.factor_search.options import SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factor_search.ramps import best_shapes, ramps
from longrope.factor_search.space import Candidate
from longrope.factors.tiers import ladder_targets
from longrope.patching import rope_settings

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = 64
SMALL = {"target_length": TARGET, "samples": 2, "steps": 4, "ladder": True, "progress": False}
EVOLUTION = {
    "method": "evolution", "population": 5, "mutations": 2, "crossovers": 2, "iterations": 2,
    "parents": 3, "race": True,
}  # fmt: skip
METHODS = {"gradient": {}, "evolution": EVOLUTION}


def search(model, texts, **changes):
    options = SMALL | changes
    if options.get("method") == "evolution":
        options.pop("steps")
    return longrope.search(model, texts, **options)


def values(e):
    return e.lambdas, e.start_tokens, e.attention_factor


@pytest.fixture(scope="module")
def texts():
    return build_documents()


@pytest.fixture(scope="module")
def held_out(texts):
    return [text[:TARGET] for text in texts[5:]]


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def finished(method, texts, held_out, tmp_path_factory):
    """A finished run: its folder and its result."""
    out = tmp_path_factory.mktemp("finished")
    with threads(1):
        result = search(
            build_model(), texts[:5], validation=held_out, out=out, **METHODS[method]
        )  # fmt: skip
    return out, result


def test_every_tier_has_its_range_and_the_first_is_the_model(finished):
    out, result = finished
    assert result.tiers.limits == (16, 32, 64)
    assert result.tiers[0] == RescaleFactors.none(original_length=16, rotary_dim=16)
    assert result.factors == result.tiers[-1]
    assert result.stages == (result.factors,)
    assert Tiers.load(out / "tiers.json") == result.tiers
    assert RescaleFactors.load(out / "factors.json") == result.factors
    assert [k for k, _ in itertools.groupby(e.tier for e in result.history)] == [1, 2]


def test_the_perplexity_is_that_of_all_ranges(finished):
    """Of 15 and 31 tokens: the last token of a range predicts the next one's first, or none."""
    _, result = finished
    nll = sum(n * chosen_of(result, tier).nll for tier, n in ((1, 15), (2, 31))) / 46
    assert math.log(result.validation_perplexity) == pytest.approx(nll, rel=1e-6)


def chosen_of(result, number):
    """Return the validation of a tier that is in the result."""
    tier = result.tiers[number]
    key = (tuple(tier.lambdas.tolist()), tier.start_tokens, tier.attention_factor)
    return [
        e
        for e in result.history
        if e.tier == number and e.role == "validation" and values(e) == key
    ][-1]


def test_a_tiers_loss_is_that_of_its_range_under_the_tiers(finished, held_out):
    _, result = finished
    model = build_model()
    longrope.apply(model, result.tiers)
    with torch.no_grad():
        ids = torch.stack(list(held_out))
        logits = model(ids).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(len(ids), -1)
    for number, (begin, end) in enumerate(itertools.pairwise(result.tiers.limits), 1):
        expected = nll[:, begin : end - 1].double().mean().item()
        assert chosen_of(result, number).nll == pytest.approx(expected, rel=1e-4)


def test_a_tier_is_the_best_of_its_finalists(finished):
    """YaRN among them, so that it is never worse there, behind the same tiers."""
    _, result = finished
    for number in (1, 2):
        judged = [e for e in result.history if e.tier == number and e.role == "validation"]
        behind = [e for e in judged if e.origin != "yarn by position"]
        assert "yarn" in {e.origin for e in behind}
        gain = 0.001 * (chosen_of(result, number).start_tokens > 0)
        assert chosen_of(result, number).nll <= min(e.nll for e in behind) + gain + 1e-9


def test_a_tier_begins_with_what_the_tier_below_leads_to(texts):
    rope = rope_settings(build_model())
    problem = Problem.of(rope, SearchOptions(target_length=TARGET, ladder=True))
    taken = Candidate((100, 110, 150, 150, 180, 200, 210, 220), 2, attention_factor=1.1)
    seeds = dataclasses.replace(problem, below=(taken, 32)).seeds()
    assert list(seeds)[:3] == ["pi", "ntk", "yarn"]
    assert list(seeds)[-2:] == ["tier below", "stretched"]
    squares = (1.0, 1.21, 2.25, 2.25, 3.24, 4.0, 4.41, 4.84)
    assert seeds["tier below"].lambdas == squares
    assert seeds["stretched"].lambdas == (2.0, 2.2, 3.0, 3.0, 3.6, 4.0, 4.2, 4.4)
    for name in ("tier below", "stretched"):
        assert (seeds[name].start_tokens, seeds[name].attention_factor) == (2, 1.21)
    # With one attention factor for all candidates they have that.
    problem = Problem.of(rope, SearchOptions(target_length=TARGET, attention_factor="su"))
    assert (
        dataclasses.replace(problem, below=(taken, 32)).seeds()["stretched"].attention_factor
        is None
    )  # fmt: skip
    result = search(build_model(), texts)
    # The first tier compares all ramps, the second those of the shapes that were best there.
    first, second = (
        {e.lambdas: e for e in result.history if e.origin == "ramp" and e.tier == tier}
        for tier in (1, 2)
    )
    assert len(first) > len(second) > 0
    assert len(second) <= ladder.RAMPS


def test_the_ramps_of_a_tier_have_the_best_shapes_and_the_attention_factor_below():
    rope = rope_settings(build_model())
    options = SearchOptions(target_length=TARGET, ladder=True)
    lower = Problem.of(rope, options, target_length=32)
    losses = {c: float(number) for number, c in enumerate(reversed(ramps(lower)))}
    shapes = best_shapes(lower, losses, 2)
    assert ramps(dataclasses.replace(lower, shapes=shapes)) == ramps(lower)[:-3:-1]
    taken = Candidate((100,) * 8, attention_factor=1.1)
    upper = dataclasses.replace(Problem.of(rope, options), below=(taken, 32), shapes=shapes)
    found = ramps(upper)
    assert {c.attention_factor for c in found} == {1.21}
    assert [c.hundredths[-1] for c in found] == [400] * len(found)


def test_a_hybrid_search_of_a_ladder(texts):
    result = search(build_model(), texts, **EVOLUTION | {"method": "hybrid"})
    assert result.tiers.limits == (16, 32, 64)
    assert {e.origin for e in result.history if e.tier == 2} >= {"mutation", "gradient"}


def test_where_yarn_by_position_is_better_it_is_returned(texts, monkeypatch):
    """A search that finds nothing good: every other loss is made worse."""
    measure = range_evaluator.RangeEvaluator.__call__

    def worse(self, candidates, windows):
        losses = measure(self, candidates, windows)
        below = self._prefix.below[-1]
        rules = self._prefix.below.limits[-1] == 16 or bool(
            np.allclose(below.lambdas, np.round(yarn(32).lambdas, 2))
        )
        return losses if rules else [loss + 5 for loss in losses]

    def yarn(length):
        return RescaleFactors.yarn(original_length=16, target_length=length, rotary_dim=16)

    monkeypatch.setattr(range_evaluator.RangeEvaluator, "__call__", worse)
    result = search(build_model(), texts, start_tokens=0)
    for tier in result.tiers[1:]:
        np.testing.assert_allclose(tier.lambdas, yarn(tier.target_length).lambdas, atol=0.005)
    assert {e.role for e in result.history if e.origin == "yarn by position"} == {
        "search", "validation",
    }  # fmt: skip


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_the_history_counts_the_tokens_that_went_through_the_model(texts, monkeypatch, keep):
    monkeypatch.setattr(ladder, "KEPT_SHARE", 0.25 if keep else 0.0)
    model, tokens = build_model(), [0]

    def count(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids.numel() > 4:  # probes of the head have 4 tokens
            tokens[0] += ids.numel() * (3 if torch.is_grad_enabled() else 1)

    hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
    # Prefixes that are not kept are computed for every pass, here for every row.
    result = search(model, texts, start_tokens=0, batch_size=None if keep else 1)
    hook.remove()
    passes = sum(e.forward_equivalents for e in result.history)
    # The last token of a window predicts none and does not go through the model.
    most = passes * TARGET
    ranges = sum(e.windows * (3 if e.role == "gradient" else 1) for e in result.history)
    assert tokens[0] == pytest.approx(most - ranges, rel=1e-6)


def test_prefixes_that_are_not_kept_change_nothing_but_the_cost(texts, monkeypatch, finished):
    kept = search(build_model(), texts, steps=2)
    monkeypatch.setattr(ladder, "KEPT_SHARE", 0.0)
    computed = search(build_model(), texts, steps=2)
    assert computed.tiers == kept.tiers
    assert [e.nll for e in computed.history] == [e.nll for e in kept.history]
    costs = [sum(e.forward_equivalents for e in r.history) for r in (kept, computed)]
    assert costs[0] < costs[1]


def test_windows_in_chunks_give_the_same_losses(texts, monkeypatch):
    from longrope.evaluation.memory import BackwardPlan, BatchPlan
    from longrope.factor_search import run

    whole = search(build_model(), texts, steps=2, start_tokens=0)
    monkeypatch.setattr(run, "plan_batches", lambda *_, **__: BatchPlan(2, 10))
    monkeypatch.setattr(run, "plan_backward", lambda *_: BackwardPlan(chunk=10))
    chunks = search(build_model(), texts, steps=2, start_tokens=0)
    first = [e for e in whole.history if e.tier == 1][:8]
    assert [e.nll for e in chunks.history[:8]] == pytest.approx([e.nll for e in first], rel=1e-5)
    np.testing.assert_allclose(chunks.tiers[1].lambdas, whole.tiers[1].lambdas, atol=0.02)


# --- nothing is lost --------------------------------------------------------------------------


def test_resuming_from_any_line_gives_the_uninterrupted_run(
    finished, method, texts, held_out, tmp_path, monkeypatch
):
    out, expected = finished
    lines = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1, max(1, len(lines) // 7)):
        place = tmp_path / str(kept)
        place.mkdir()
        (place / "journal.jsonl").write_bytes(b"".join(lines[:kept]) + lines[0][:7])
        again = search(
            build_model(), texts[:5], validation=held_out, out=place, **METHODS[method]
        )  # fmt: skip
        assert again == expected
        assert (place / "tiers.json").read_bytes() == (out / "tiers.json").read_bytes()
        assert (place / "journal.jsonl").read_bytes() == b"".join(lines)


def test_a_killed_search_resumes(tmp_path, texts, held_out):
    code = textwrap.dedent(f"""
        import os, signal, longrope, torch
        from support.tiny_search import build_documents, build_model
        torch.set_num_threads(1)
        def progress(evaluations):
            if evaluations[-1].tier == 2 and evaluations[-1].role == "gradient":
                os.kill(os.getpid(), signal.SIGKILL)
        texts = build_documents()
        longrope.search(build_model(), texts[:5], validation=[t[:{TARGET}] for t in texts[5:]],
                        out={str(tmp_path)!r}, **{SMALL | {"progress": None}!r}
                        | {{"progress": progress}})
        """)
    killed = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    again = search(build_model(), texts[:5], validation=held_out, out=tmp_path)
    assert again == search(build_model(), texts[:5], validation=held_out)


def test_another_ladder_is_another_search(finished, method, texts, held_out, tmp_path):
    out, _ = finished
    (tmp_path / "journal.jsonl").write_bytes((out / "journal.jsonl").read_bytes())
    more = METHODS[method]
    with pytest.raises(ValueError, match="is the journal of another search"):
        search(
            build_model(), texts[:5], validation=held_out, out=tmp_path, **more | {"ladder": False}
        )
    if method == "evolution":
        with pytest.raises(ValueError, match=r"another search \(sizes.iterations: 2 there, 3 here"):
            search(
                build_model(), texts[:5], validation=held_out, out=tmp_path,
                **more | {"iterations": 3},
            )  # fmt: skip


def test_the_folder_is_summed_up(finished):
    out, result = finished
    facts = folder.summary(out)
    assert facts["ladder"].startswith("tiers up to 32, 64 tokens")
    assert facts["state"] == "finished"
    header = json.loads((out / "journal.jsonl").read_text().splitlines()[0])
    assert header["ladder"]["targets"] == [32, 64]
    rows = (out / "history.csv").read_text().splitlines()
    assert rows[0].startswith("evaluation,role,tier,iteration")
    assert len(rows) == 1 + len(result.history)


# --- what can be asked for ----------------------------------------------------------------------


def test_without_a_ladder_there_are_no_tiers(texts):
    result = search(build_model(), texts, ladder=False)
    assert result.tiers is None
    assert {(e.tier, e.passes) for e in result.history} == {(None, None)}


def test_ratios_that_are_no_power_of_two():
    assert ladder_targets(16, 64) == [32, 64]
    assert ladder_targets(16, 70) == [32, 64, 70]
    assert ladder_targets(16, 24) == [24]


def test_needles_bos_and_last_tokens(texts):
    long = [torch.cat([a, b, a, b]) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    model = build_model()
    options = {"target_length": 200, "original_length": 50, "steps": 2, "start_tokens": 0}
    result = search(model, long, objective="needle", **options)
    assert result.tiers.limits == (50, 100, 200)
    with_bos = search(model, long, bos=3, **options)
    scored = search(model, long, last_tokens=8, **options)
    assert with_bos.tiers.limits == scored.tiers.limits == (50, 100, 200)
    last = [e for e in scored.history if e.tier == 2 and e.role == "validation"]
    plain = search(model, long, **options)
    assert {e.nll for e in last}.isdisjoint(e.nll for e in plain.history)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_length": 16}, "target_length: expected more than the original length 16, got 16"),
        (
            {"target_length": 33},
            "target_length: expected more than 33 tokens, so that the last tier, which begins at "
            "32, has tokens to score, got 33",
        ),
        (
            {"objective": "needle", "target_length": 128},
            "objective: expected 'perplexity' for a ladder whose first tier ends at 32 tokens, got "
            "'needle', which takes 96 or more",
        ),
        ({"target_length": 128}, r"documents\[0\]: expected at least 128 tokens"),
        (
            {"method": "evolution", "shard_sequence": True},
            "shard_sequence: expected False with lad",
        ),
        ({"ladder": "yes"}, "ladder: expected True or False, got 'yes'"),
    ],
)
def test_bad_input(texts, changes, message):
    with pytest.raises(ValueError, match=message):
        search(build_model(), texts, **changes)


def test_sliding_windows_that_hold_no_range(texts):
    sizes = SIZES | {"sliding_window": 8}
    model = tiny_models.build("mistral", **sizes)
    with pytest.raises(ValueError, match="model: expected a layer that sees beyond the first tier"):
        search(model, texts)


def test_a_family_that_names_no_key_value_heads():
    model = families.build("gpt_neox")
    del model.config.num_key_value_heads  # which that of a Pythia does not have
    texts = list(torch.randint(1, 64, (3, 140), generator=torch.Generator().manual_seed(0)))
    options = {"target_length": 128, "samples": 1, "steps": 1, "start_tokens": 0}
    assert search(model, texts, **options).tiers.limits == (32, 64, 128)


def test_results_compare():
    """What `test_resuming...` relies on: a result with another history is another result."""
    none = RescaleFactors.none(original_length=16, rotary_dim=16)
    result = longrope.SearchResult(none, 1.0, None, (), Tiers([none]), (none,))
    assert result == dataclasses.replace(result)
    assert result != dataclasses.replace(result, tiers=None)
