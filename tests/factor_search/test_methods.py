"""`longrope.search` by gradient and hybrid: results, resuming, bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from support.threads import threads
from support.tiny_search import build_model

import longrope
from longrope.evaluation.memory import WHOLE_WINDOWS, BackwardPlan
from longrope.factor_search import gradient, methods, run
from longrope.factor_search.history import BASELINES

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "target_length": 32,
    "samples": 3,
    "steps": 6,
    "learning_rate": 0.2,
    "progress": False,
}
SIZES = {"population": 6, "mutations": 2, "crossovers": 2, "iterations": 2, "parents": 3}
OPTIONS = {"gradient": SMALL, "hybrid": SMALL | SIZES}


def search(model, documents, method, **changes):
    return longrope.search(model, documents, method=method, **OPTIONS[method] | changes)


def journal_of(out):
    return Path(out) / "journal.jsonl"


def of_role(result, role):
    return [e for e in result.history if e.role == role]


@pytest.fixture(scope="module", params=["gradient", "hybrid"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(method, shared_model, documents, tmp_path_factory):
    """A finished run: its folder and its result."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with threads(1):
        result = search(shared_model, documents, method, out=out, attention_factor="search")
    return out, result


def test_the_result_is_the_best_on_the_validation_windows(uninterrupted):
    _, result = uninterrupted
    gain = methods.START_TOKEN_GAIN
    best = min(of_role(result, "validation"), key=lambda e: e.nll + gain * (e.start_tokens > 0))
    factors = result.factors

    def values(e):
        return tuple(e.lambdas), e.start_tokens, e.attention_factor

    assert values(factors) == values(best)
    assert result.validation_perplexity == pytest.approx(best.perplexity)
    assert "yarn" in {e.origin for e in of_role(result, "validation")}
    searched = [e for e in of_role(result, "search") if values(e) == values(best)]
    assert result.perplexity == pytest.approx(searched[0].perplexity)


def test_the_best_closed_form_is_a_finalist(uninterrupted, method):
    _, result = uninterrupted
    few = of_role(result, "screen" if method == "gradient" else "search")
    assert len({e.lambdas for e in few if e.origin in BASELINES}) > 3
    forms = [e for e in of_role(result, "search") if e.origin in BASELINES]
    best = min(forms, key=lambda e: e.nll)
    judged = [e for e in of_role(result, "validation") if e.lambdas == best.lambdas]
    assert judged and result.validation_perplexity <= judged[0].perplexity * math.exp(
        methods.START_TOKEN_GAIN
    )


def test_the_perplexity_is_that_of_the_factors(shared_model, documents, uninterrupted):
    _, result = uninterrupted
    held_out = [d[:32] for d in documents[5:]]
    result = search(shared_model, documents[:5], "gradient", validation=held_out)
    longrope.apply(shared_model, result.factors)
    measured = longrope.perplexity(shared_model, held_out, length=32, stride=32)
    longrope.remove(shared_model)
    assert result.validation_perplexity == pytest.approx(measured, rel=1e-4)


def test_the_result_is_on_the_grid_monotone_and_bounded(uninterrupted):
    _, result = uninterrupted
    lambdas = result.factors.lambdas
    assert np.abs(lambdas * 100 - np.rint(lambdas * 100)).max() < 1e-9
    for e in result.history:
        assert (np.diff(e.lambdas) >= 0).all()
        assert min(e.lambdas) >= 1
        assert max(e.lambdas) <= 2.5 * (1 + 1e-12)


def test_without_a_bound_a_pair_that_cope_stops_stays_so(shared_model, documents):
    """CoPE's taper ends in a pair whose lambda is infinite: 1e12 in the search."""
    held_out = [d[:32] for d in documents[5:]]
    result = search(
        shared_model, documents[:5], "gradient", max_lambda=math.inf, validation=held_out
    )
    (cope, *_) = [e for e in of_role(result, "screen") if e.origin == "cope"]
    exact = longrope.RescaleFactors.none(original_length=16, target_length=32, rotary_dim=16).cope()
    stopped = np.isinf(exact.lambdas)
    assert stopped.sum() == 1 and (np.array(cope.lambdas)[stopped] == 1e12).all()
    np.testing.assert_allclose(np.array(cope.lambdas)[~stopped], exact.lambdas[~stopped], atol=0.01)
    assert np.isfinite([e.nll for e in result.history]).all()
    longrope.apply(shared_model, result.factors)
    measured = longrope.perplexity(shared_model, held_out, length=32, stride=32)
    longrope.remove(shared_model)
    assert result.validation_perplexity == pytest.approx(measured, rel=1e-4)


def test_the_descent_improves_on_its_start(shared_model, documents):
    """On the windows that it sees: tokens are random here, and nothing carries over."""
    documents = [d[:32] for d in documents[:1]]
    result = search(
        shared_model, documents, "gradient", steps=40, learning_rate=0.02, start_tokens=0
    )
    assert result.validation_perplexity is None
    steps = of_role(result, "gradient")
    assert steps[-1].nll < steps[0].nll - 0.01
    start = min(e.nll for e in of_role(result, "search") if e.origin != "gradient")
    assert np.log(result.perplexity) < start - 0.01


def test_a_descent_goes_back_to_its_best_point(shared_model, documents, monkeypatch):
    """With gradients that lead uphill every segment begins at the start again, more slowly."""
    step = gradient.GradientEvaluator.__call__

    def uphill(self, point, start_tokens, windows):
        nll, gradient = step(self, point, start_tokens, windows)
        return nll, -gradient

    monkeypatch.setattr(gradient.GradientEvaluator, "__call__", uphill)
    one = [documents[0][:32]]
    result = search(shared_model, one, "gradient", steps=10, start_tokens=0, learning_rate=0.3)
    steps = of_role(result, "gradient")
    begins = [steps[i].lambdas for i in (0, 2, 4, 6, 8)]
    assert begins[1:] == begins[:-1]
    away = [np.abs(np.log(steps[i + 1].lambdas) - np.log(begins[0])).max() for i in (0, 2, 4)]
    assert away[0] > 2 * away[1] > 4 * away[2] > 0


def test_every_step_and_evaluation_is_in_the_history_and_in_the_journal(uninterrupted):
    out, result = uninterrupted
    lines = journal_of(out).read_text().splitlines()
    assert len(lines) == 1 + len(result.history)
    assert len(of_role(result, "gradient")) == 6
    assert {e.windows for e in of_role(result, "gradient")} == {1}
    assert {e.forward_equivalents for e in of_role(result, "gradient")} == {3}
    for line, e in zip(lines[1:], result.history, strict=True):
        assert json.loads(line)["nll"] == e.nll
    assert longrope.RescaleFactors.load(out / "factors.json") == result.factors
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "history.csv").read_text().splitlines()) == len(lines)


def test_steps_never_see_a_validation_window(shared_model, documents, monkeypatch):
    seen = {"gradient": set(), "validation": set()}
    step, measure = gradient.GradientEvaluator.__call__, run.PopulationEvaluator.__call__

    def stepping(self, point, start_tokens, windows):
        seen["gradient"] |= set(windows.flatten().tolist())
        return step(self, point, start_tokens, windows)

    def measuring(self, candidates, windows):
        if len(windows) == 4:
            seen["validation"] |= set(windows.flatten().tolist())
        return measure(self, candidates, windows)

    monkeypatch.setattr(gradient.GradientEvaluator, "__call__", stepping)
    monkeypatch.setattr(run.PopulationEvaluator, "__call__", measuring)
    # Two documents whose tokens are all different, so that a token tells its place.
    long = [torch.arange(0, 20), torch.arange(20, 40)]
    search(shared_model, long, "gradient", target_length=17, steps=40, samples=1)
    search(shared_model, [torch.arange(40)], "gradient", target_length=17, steps=10, samples=4)
    assert seen["gradient"]
    assert not seen["gradient"] & seen["validation"]


def test_start_tokens_are_swept_or_fixed(shared_model, documents):
    swept = search(shared_model, documents, "gradient")
    tried = {e.start_tokens for e in of_role(swept, "screen") if e.origin == "start tokens"}
    assert tried == {1, 2, 4, 8, 12, 16}
    fixed = search(shared_model, documents, "gradient", start_tokens=3)
    assert {e.start_tokens for e in fixed.history} == {3}


def test_the_attention_factor_is_learned_unless_given(
    method, shared_model, documents, uninterrupted
):
    _, learned = uninterrupted
    steps = of_role(learned, "gradient")
    assert len({e.attention_factor for e in steps}) > 1
    assert search(shared_model, documents, method) == learned
    fixed = search(shared_model, documents, method, attention_factor=1.25)
    assert {e.attention_factor for e in fixed.history} == {1.25}


def test_seeds_decide(method, shared_model, documents, uninterrupted):
    again = search(shared_model, documents, method, attention_factor="search")
    assert again == uninterrupted[1]
    assert search(shared_model, documents, method, seed=1).history != again.history


def test_never_worse_than_yarn_even_with_steps_that_only_harm(
    method, shared_model, documents, monkeypatch
):
    step = gradient.GradientEvaluator.__call__

    def uphill(self, point, start_tokens, windows):
        nll, gradient = step(self, point, start_tokens, windows)
        return nll, -gradient

    monkeypatch.setattr(gradient.GradientEvaluator, "__call__", uphill)
    result = search(shared_model, documents, method, learning_rate=0.5)
    yarn = [e for e in of_role(result, "validation") if e.origin == "yarn"]
    assert result.validation_perplexity <= yarn[0].perplexity


# --- resuming ---------------------------------------------------------------------------------


def test_resuming_from_every_prefix_gives_the_uninterrupted_run(
    method, shared_model, documents, uninterrupted, tmp_path, monkeypatch
):
    out, expected = uninterrupted
    content = journal_of(out).read_bytes()
    lines = content.splitlines(keepends=True)
    for count in range(0, len(lines) + 1, 3):
        # Cut after `count` lines, and in the middle of the next one.
        for part in (0, 20):
            cut = b"".join(lines[:count]) + (lines[count][:part] if count < len(lines) else b"")
            again = tmp_path / f"{count} {part}"
            again.mkdir()
            journal_of(again).write_bytes(cut)
            result = search(shared_model, documents, method, out=again, attention_factor="search")
            assert result == expected
            assert journal_of(again).read_bytes() == content


def test_a_finished_run_measures_nothing_again(
    method, shared_model, documents, uninterrupted, tmp_path, monkeypatch
):
    out, expected = uninterrupted
    journal_of(tmp_path).write_bytes(journal_of(out).read_bytes())
    monkeypatch.setattr(run.PopulationEvaluator, "__call__", None)
    monkeypatch.setattr(gradient.GradientEvaluator, "__call__", None)
    again = search(shared_model, documents, method, out=tmp_path, attention_factor="search")
    assert again == expected


def test_backward_passes_are_cut_as_in_the_first_run(
    method, shared_model, documents, tmp_path, monkeypatch
):
    """What memory is free after a restart must not change the bits of later steps."""
    monkeypatch.setattr(run, "plan_backward", lambda *_: BackwardPlan(chunk=10))
    expected = search(shared_model, documents, method, out=tmp_path)
    content = journal_of(tmp_path).read_bytes()
    assert json.loads(content.splitlines()[0])["notes"]["gradient"] == [False, 10]
    steps = [n for n, line in enumerate(content.splitlines()) if b'"role": "gradient"' in line]
    monkeypatch.setattr(run, "plan_backward", lambda *_: WHOLE_WINDOWS)
    journal_of(tmp_path).write_bytes(b"".join(content.splitlines(keepends=True)[: steps[2]]))
    assert search(shared_model, documents, method, out=tmp_path) == expected
    assert journal_of(tmp_path).read_bytes() == content
    whole = search(shared_model, documents, method)
    assert whole.history != expected.history  # else the test could not fail
    assert whole.perplexity == pytest.approx(expected.perplexity, rel=1e-2)


def test_a_killed_process_loses_nothing(method, shared_model, documents, uninterrupted, tmp_path):
    """SIGKILL in the fourth step, when its gradient is known and its line half written."""
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent(f"""
            import os, signal, sys
            sys.path[:0] = [{str(Path(longrope.__file__).parents[1])!r},
                            {str(Path(__file__).parents[1])!r}]
            import torch
            torch.set_num_threads(1)
            import longrope
            from longrope.runs.journal import Journal
            from support import tiny_search

            append = Journal.append

            def append_and_die(self, entries):
                if entries[0]["role"] == "gradient" and entries[0]["iteration"] == 3:
                    self._file.write(b'{{"role": "gradient", "itera')
                    self._file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                append(self, entries)

            Journal.append = append_and_die
            documents = torch.load({str(tmp_path / "documents.pt")!r}, weights_only=True)
            longrope.search(
                tiny_search.build_model(), documents, method={method!r}, out={str(tmp_path)!r},
                attention_factor="search", **{OPTIONS[method]!r}
            )
        """)
    )
    torch.save(documents, tmp_path / "documents.pt")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert journal_of(tmp_path).read_text().endswith('"itera')
    result = search(shared_model, documents, method, out=tmp_path, attention_factor="search")
    assert result == uninterrupted[1]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"steps": 7}, "descent.steps: 6 there, 7 here"),
        ({"activation_checkpointing": True}, "activation_checkpointing: null there, true here"),
        ({"learning_rate": 0.1}, "descent.learning_rate: 0.2 there, 0.1 here"),
        ({"attention_factor": "yarn"}, "attention_factor, learned: true there, false here"),
        ({"method": "evolution"}, "method: "),
    ],
)
def test_the_journal_of_another_search_is_refused(
    shared_model, documents, uninterrupted, method, changes, difference
):
    out, _ = uninterrupted
    options = OPTIONS[method] | {"method": method, "attention_factor": "search"} | changes
    if options["method"] == "evolution":
        options = {"target_length": 32, "progress": False, "method": "evolution"}
    with pytest.raises(ValueError, match=difference):
        longrope.search(shared_model, documents, out=out, **options)


def test_other_documents_are_refused_even_where_the_windows_are_the_same(
    shared_model, documents, tmp_path
):
    held_out = [d[:32] for d in documents[5:]]
    given = [d[:32] for d in documents[:3]]
    search(shared_model, given, "gradient", out=tmp_path, validation=held_out)
    with pytest.raises(ValueError, match="another search"):
        search(shared_model, documents[:4], "gradient", out=tmp_path, validation=held_out)


@pytest.mark.parametrize("samples", [1, 3])
def test_the_budget_of_a_hybrid_search_ends_its_evolution_alone(shared_model, documents, samples):
    """Also where there is one window, on which the ramps are compared too."""
    searched = []
    for budget in (1, 4, 6):
        result = search(
            shared_model, documents, "hybrid", max_evaluations=budget, samples=samples, steps=2
        )
        steps = [n for n, e in enumerate(result.history) if e.role == "gradient"]
        assert len(steps) == 2
        searched.append(sum(e.role == "search" for e in result.history[: steps[0]]))
    assert np.diff(searched).tolist() == [3, 2]


def test_a_search_inside_inference_mode(shared_model, documents, method):
    expected = search(shared_model, documents, method)
    with torch.inference_mode():
        given = [d + 0 for d in documents]
        assert search(shared_model, given, method) == expected
        made_here = build_model()
        with pytest.raises(ValueError, match="model: expected parameters that were made outside"):
            search(made_here, given, method)


def test_numbers_of_numpy_are_numbers(shared_model, documents, tmp_path):
    plain = {"steps": 3, "learning_rate": 0.25, "windows_per_step": 1, "batch_size": 2, "seed": 4}
    numpy = {name: np.array(value, np.float32 if name == "learning_rate" else None)[()]
             for name, value in plain.items()}  # fmt: skip
    sizes = {"population": 5, "iterations": 2, "mutation_probability": 0.5, "max_evaluations": 8}
    numpy |= {name: np.array(value)[()] for name, value in sizes.items()}
    numpy["activation_checkpointing"] = np.bool_(False)
    plain["activation_checkpointing"] = False
    expected = search(shared_model, documents, "hybrid", **plain, **sizes)
    assert search(shared_model, documents, "hybrid", **numpy, out=tmp_path) == expected


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "gradient", "steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"method": "gradient", "learning_rate": 0}, "learning_rate: expected a finite number"),
        ({"method": "gradient", "windows_per_step": 1.5}, "windows_per_step: expected an integer"),
        ({"method": "gradient", "population": 8}, "population: expected None with method='grad"),
        ({"method": "gradient", "max_evaluations": 8}, "max_evaluations: expected None with"),
        ({"method": "evolution", "steps": 8}, "steps: expected None with method='evolution'"),
        ({"method": "evolution", "attention_factor": "search"}, "attention_factor: expected 'yarn"),
        ({"method": "hybrid", "iterations": 0}, "iterations: expected an integer of at least 1"),
        ({"method": "hybrid", "mutations": 0, "crossovers": 0}, "mutations, crossovers: expected"),
        ({"method": "hybrid", "mutation_probability": "0.3"}, "mutation_probability: expected 0"),
        ({"method": "hybrid", "mutation_probability": 1.5}, "mutation_probability: expected 0"),
        ({"method": "hybrid", "race": "no"}, "race: expected True or False, got 'no'"),
        ({"method": "gradient", "activation_checkpointing": 1}, "activation_checkpointing: expect"),
        ({"method": "gradient", "last_tokens": 32}, "last_tokens: expected less than the target"),
        ({"method": "gradient", "progress": "x"}, "progress: expected True, False or a function"),
        ({"method": "gradient", "resume": None}, "resume: expected True or False, got None"),
        ({"method": "gradient", "out": 3}, "out: expected a path, got int"),
    ],
)
def test_bad_input_is_one_sentence(shared_model, documents, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        longrope.search(
            shared_model, documents, **{"target_length": 32, "progress": False} | options
        )


def test_a_gradient_that_is_not_finite_is_an_error_that_names_the_step(
    shared_model, documents, monkeypatch
):
    monkeypatch.setattr(
        gradient.GradientEvaluator,
        "__call__",
        lambda self, point, start_tokens, windows: (1.0, np.full(9, np.nan)),
    )
    with pytest.raises(ValueError, match="not finite in step 0"):
        search(shared_model, documents, "gradient")
