"""`longrope.search(race=True)`: results, costs, and resuming to the bit."""

import json
from collections import defaultdict

import pytest
from support.threads import threads

import longrope
from longrope.factor_search import racing, run

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "method": "evolution",
    "target_length": 32,
    "samples": 4,
    "population": 10,
    "mutations": 4,
    "crossovers": 4,
    "iterations": 3,
    "parents": 4,
    "race": True,
    "progress": False,
}


def search(model, documents, **changes):
    return longrope.search(model, documents, **SMALL | changes)


def journal_of(out):
    return out / "journal.jsonl"


def by_candidate(result):
    found = defaultdict(list)
    for e in result.history:
        if e.role in ("race", "search"):
            found[e.lambdas, e.start_tokens].append(e)
    return found


@pytest.fixture(scope="module", autouse=True)
def lenient():
    """Random tokens hardly tell candidates apart: the test at 0.01 would drop next to none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(racing, "P", 0.2)
        yield


@pytest.fixture(scope="module")
def uninterrupted(shared_model, documents, tmp_path_factory):
    """A finished run: its folder and its result."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with threads(1):
        result = search(shared_model, documents, out=out)
    return out, result


def test_candidates_are_dropped_and_the_others_get_the_losses_of_all_windows(
    shared_model, documents, uninterrupted
):
    _, result = uninterrupted
    raced = by_candidate(result)
    finished = {key: e[-1].nll for key, e in raced.items() if e[-1].role == "search"}
    assert len(finished) < len(raced)
    for evaluations in raced.values():
        complete = evaluations[-1].role == "search"
        assert [e.role for e in evaluations[:-1]] == ["race"] * (len(evaluations) - 1)
        assert (sum(e.windows for e in evaluations) == 4) == complete
    plain = search(shared_model, documents, race=False)
    known = {(e.lambdas, e.start_tokens): e.nll for e in plain.history if e.role == "search"}
    both = finished.keys() & known.keys()
    assert len(both) > 5
    assert all(finished[key] == pytest.approx(known[key], rel=1e-6) for key in both)


def test_the_cost_is_that_of_the_forward_passes(shared_model, documents, monkeypatch):
    rows = []
    measure = run.PopulationEvaluator.block_sums

    def counting(self, candidates, windows, blocks):
        rows.append(len(candidates) * len(windows))
        return measure(self, candidates, windows, blocks)

    monkeypatch.setattr(run.PopulationEvaluator, "block_sums", counting)
    result = search(shared_model, documents)
    assert sum(e.forward_equivalents for e in result.history) == sum(rows)
    every = len(by_candidate(result)) * SMALL["samples"]
    assert sum(e.forward_equivalents for e in result.history if e.role != "validation") < every


def test_the_baselines_are_finalists_and_the_result_is_the_best(uninterrupted):
    _, result = uninterrupted
    validated = [e for e in result.history if e.role == "validation"]
    assert {"pi", "ntk", "yarn"} <= {e.origin for e in validated}
    best = min(validated, key=lambda e: e.nll)
    assert (tuple(result.factors.lambdas), result.factors.start_tokens) == (
        best.lambdas,
        best.start_tokens,
    )


def test_every_evaluation_is_a_line_with_its_block_sums(uninterrupted):
    out, result = uninterrupted
    entries = [json.loads(line) for line in journal_of(out).read_text().splitlines()]
    assert entries[0]["race"] == {"growth": 2, "blocks": 16, "p": 0.01}
    assert len(entries) == 1 + len(result.history)
    sums = defaultdict(list)
    for entry, e in zip(entries[1:], result.history, strict=True):
        assert (entry["role"], entry["nll"]) == (e.role, e.nll)
        if e.role != "validation":
            key = (e.lambdas, e.start_tokens)
            sums[key] += entry["block_sums"]
            assert len(sums[key]) == entry["windows"][1] == entry["windows"][0] + e.windows
            assert e.nll == pytest.approx(sum(map(sum, sums[key])) / 31 / len(sums[key]))


@pytest.mark.parametrize("method", ["evolution", "hybrid"])
def test_resuming_from_every_prefix_gives_the_uninterrupted_run(
    shared_model, documents, uninterrupted, tmp_path, monkeypatch, method
):
    out, expected = uninterrupted
    changes = {"method": method, "batch_size": None}
    if method == "hybrid":
        out, changes = tmp_path / "hybrid", {**changes, "steps": 2, "iterations": 2}
        expected = search(shared_model, documents, out=out, **changes)
        assert "race" in {e.role for e in expected.history}
    content = journal_of(out).read_bytes()
    lines = content.splitlines(keepends=True)
    for count in range(0, len(lines) + 1, 1 if method == "evolution" else 7):
        for part in (0, 20) if count % 7 == 0 else (0,):  # also in the middle of a line
            cut = b"".join(lines[:count]) + (lines[count][:part] if count < len(lines) else b"")
            again = tmp_path / f"{count} {part}"
            again.mkdir()
            journal_of(again).write_bytes(cut)
            result = search(shared_model, documents, out=again, **changes)
            assert result == expected
            assert journal_of(again).read_bytes() == content


def test_a_finished_run_measures_nothing_again(
    shared_model, documents, uninterrupted, tmp_path, monkeypatch
):
    out, expected = uninterrupted
    journal_of(tmp_path).write_bytes(journal_of(out).read_bytes())
    monkeypatch.setattr(run.PopulationEvaluator, "block_sums", None)
    assert search(shared_model, documents, out=tmp_path) == expected


@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_finished_run_goes_on_with_a_larger_budget(shared_model, documents, tmp_path, batch_size):
    """Also where the smaller budget had ended a generation before its second stage was complete."""
    search(shared_model, documents, out=tmp_path / "grown", max_evaluations=12, iterations=2,
           batch_size=batch_size)  # fmt: skip
    for budget, iterations in ((14, 3), (17, 3)):
        expected = search(
            shared_model, documents, out=tmp_path / str(budget), max_evaluations=budget,
            iterations=iterations, batch_size=batch_size,
        )  # fmt: skip
        assert len(by_candidate(expected)) == budget
        result = search(
            shared_model, documents, out=tmp_path / "grown", max_evaluations=budget,
            iterations=iterations, batch_size=batch_size,
        )  # fmt: skip
        assert result == expected
        assert (
            journal_of(tmp_path / "grown").read_bytes()
            == journal_of(tmp_path / str(budget)).read_bytes()
        )
    for smaller in ({"max_evaluations": 16}, {"max_evaluations": 12}, {"iterations": 1}):
        with pytest.raises(ValueError, match="holds more evaluations than this budget allows"):
            search(
                shared_model, documents, out=tmp_path / "grown", batch_size=batch_size, **smaller
            )


def test_the_journal_of_a_search_without_it_is_refused(
    shared_model, documents, uninterrupted, tmp_path
):
    with pytest.raises(ValueError, match=r"race: {.* there, null here"):
        search(shared_model, documents, out=uninterrupted[0], race=False)
    search(shared_model, documents, out=tmp_path, race=False, iterations=1)
    with pytest.raises(ValueError, match=r"race: null there, {.* here"):
        search(shared_model, documents, out=tmp_path, iterations=1)


def test_without_racing_nothing_of_it_is_there(shared_model, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(run.Measurer, "measure_stage", None)
    expected = search(shared_model, documents, out=tmp_path, race=False)
    assert {e.role for e in expected.history} == {"search", "validation"}
    content = journal_of(tmp_path).read_text()
    header, *lines = content.splitlines()
    keys = ["role", "iteration", "origin", "hundredths", "start_tokens", "attention_factor", "nll"]
    assert all(list(json.loads(line)) == [*keys, "checksum"] for line in lines)
    known = json.loads(header)
    assert known["race"] is known["critical_dimension"] is None
    journal_of(tmp_path).write_text("\n".join([header, *lines[:9], ""]))
    assert search(shared_model, documents, out=tmp_path, race=False) == expected
    assert journal_of(tmp_path).read_text() == content


def test_one_window_or_few_scored_tokens_drop_nobody(shared_model, documents):
    result = search(shared_model, documents, samples=1, iterations=2)
    assert {e.role for e in result.history} == {"search", "validation"}
    result = search(shared_model, documents, samples=2, iterations=2, last_tokens=1)
    raced = by_candidate(result)
    assert all(e[-1].role == "search" for e in raced.values())


def test_a_descent_has_no_race(shared_model, documents):
    with pytest.raises(ValueError, match="race: expected False with method='gradient', got True"):
        longrope.search(shared_model, documents, target_length=32, method="gradient", race=True)
