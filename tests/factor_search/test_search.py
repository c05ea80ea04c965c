"""`longrope.search` from the outside: results, run directory, resuming, bad input."""

import csv
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
from support.tiny_search import SMALL

import longrope
from longrope.evaluation import memory
from longrope.evaluation.memory import BackwardPlan, BatchPlan
from longrope.factor_search import run
from longrope.factor_search.options import SearchOptions

pytestmark = pytest.mark.usefixtures("one_thread")


def search(model, documents, **changes):
    return longrope.search(model, documents, **SMALL | changes)


def journal_of(out):
    return Path(out) / "journal.jsonl"


@pytest.fixture(scope="module")
def uninterrupted(shared_model, documents, tmp_path_factory):
    """A finished run: its folder and its result."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with threads(1):
        result = search(shared_model, documents, out=out)
    return out, result


# --- what it finds ----------------------------------------------------------------------------


def test_the_result_is_the_best_on_the_validation_windows(uninterrupted):
    _, result = uninterrupted
    searched = [e for e in result.history if e.role == "search"]
    validated = [e for e in result.history if e.role == "validation"]
    assert result.history == (*searched, *validated)
    assert [e.origin for e in searched[:3]] == ["pi", "ntk", "yarn"]
    best = min(validated, key=lambda e: e.nll)
    assert tuple(result.factors.lambdas) == best.lambdas
    assert result.factors.start_tokens == best.start_tokens
    assert result.validation_perplexity == pytest.approx(best.perplexity)
    same = [e for e in searched if (e.lambdas, e.start_tokens) == (best.lambdas, best.start_tokens)]
    assert result.perplexity == pytest.approx(same[0].perplexity)
    # The finalists: the 8 best of the search and the three that need none.
    ranked = sorted(searched, key=lambda e: e.nll)
    expected = {(e.lambdas, e.start_tokens) for e in [*ranked[:8], *searched[:3]]}
    assert expected <= {(e.lambdas, e.start_tokens) for e in validated}


def test_the_history_is_on_the_grid_monotone_and_without_repeats(uninterrupted):
    _, result = uninterrupted
    searched = [e for e in result.history if e.role == "search"]
    assert len({(e.lambdas, e.start_tokens) for e in searched}) == len(searched)
    for e in searched:
        lambdas = np.array(e.lambdas)
        assert (np.diff(lambdas) >= 0).all()
        assert lambdas.min() >= 1
        assert lambdas.max() <= 1.25 * 2
        assert np.abs(lambdas * 100 - np.rint(lambdas * 100)).max() < 1e-9
        assert e.start_tokens in (0, 1, 2, 4, 8, 12, 16)  # none beyond the original length


def test_without_enough_text_for_validation_the_best_of_the_search_wins(shared_model, documents):
    result = search(shared_model, [d[:32] for d in documents[:2]])
    assert result.validation_perplexity is None
    assert {e.role for e in result.history} == {"search"}
    assert result.perplexity == pytest.approx(min(e.perplexity for e in result.history))


def test_validation_documents_are_used_where_given(shared_model, documents):
    held_out = [d[:32] for d in documents[5:]]
    result = search(shared_model, documents[:5], validation=held_out)
    longrope.apply(shared_model, result.factors)
    measured = longrope.perplexity(shared_model, held_out, length=32, stride=32)
    longrope.remove(shared_model)
    assert result.validation_perplexity == pytest.approx(measured, rel=1e-4)


def test_a_function_in_place_of_the_progress_bar_gets_every_evaluation_in_order(
    shared_model, documents, uninterrupted, capsys
):
    seen = []
    result = search(shared_model, documents, progress=seen.extend)
    assert tuple(seen) == result.history == uninterrupted[1].history
    assert capsys.readouterr() == ("", "")


def test_seeds_decide(shared_model, documents, uninterrupted):
    again = search(shared_model, documents)
    assert again.history == uninterrupted[1].history
    assert again.factors == uninterrupted[1].factors
    assert search(shared_model, documents, seed=1).history != again.history


@pytest.mark.parametrize(
    ("argument", "factor"),
    [("yarn", 0.1 * math.log(2) + 1), ("su", math.sqrt(1 + 1 / 4)), (1.25, 1.25)],
)
def test_attention_factor(shared_model, documents, argument, factor):
    result = search(shared_model, documents, iterations=1, attention_factor=argument)
    assert result.factors.attention_factor == pytest.approx(factor)


def test_start_tokens_and_bound_can_be_fixed(shared_model, documents):
    result = search(shared_model, documents, start_tokens=3, max_lambda=1.5)
    assert {e.start_tokens for e in result.history} == {3}
    assert max(max(e.lambdas) for e in result.history) <= 1.5


def test_presets(shared_model, documents):
    result = search(shared_model, documents, preset="official-code", iterations=8)
    assert 2.5 < max(max(e.lambdas) for e in result.history) <= 3


def test_the_number_of_evaluations_can_be_limited(shared_model, documents, uninterrupted):
    result = search(shared_model, documents, max_evaluations=9, batch_size=8)
    searched = [e for e in result.history if e.role == "search"]
    assert len(searched) == 9
    assert [e.lambdas for e in searched] == [e.lambdas for e in uninterrupted[1].history[:9]]


def test_the_model_is_left_as_it_was(model, documents):
    ids = documents[0][None]
    with torch.no_grad():
        before = model(ids).logits
    model.train()
    search(model, documents, iterations=1)
    assert model.training
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, before)


# --- the run directory ------------------------------------------------------------------------


def test_the_run_directory(uninterrupted):
    out, result = uninterrupted
    assert longrope.RescaleFactors.load(out / "factors.json") == result.factors
    with (out / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in rows] == [e.perplexity for e in result.history]
    assert rows[2]["origin"] == "yarn"
    assert float(rows[2]["lambda_7"]) == 2.0
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((out / "config.json").read_text())
    assert config["seed"] == 0
    assert config["problem"]["target_length"] == 32
    assert len(journal_of(out).read_text().splitlines()) == 1 + len(result.history)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_progress_is_shown(shared_model, documents, capsys):
    search(shared_model, documents, progress=True)
    assert "perplexity" in capsys.readouterr().err


# --- resuming ---------------------------------------------------------------------------------


def test_resuming_from_every_prefix_gives_the_uninterrupted_run(
    shared_model, documents, uninterrupted, tmp_path, monkeypatch
):
    out, expected = uninterrupted
    content = journal_of(out).read_bytes()
    lines = content.splitlines(keepends=True)
    for count in range(len(lines) + 1):
        # Cut after `count` lines, and in the middle of the next one.
        for part in (0, 20):
            cut = b"".join(lines[:count]) + (lines[count][:part] if count < len(lines) else b"")
            again = tmp_path / f"{count} {part}"
            again.mkdir()
            journal_of(again).write_bytes(cut)
            result = search(shared_model, documents, out=again)
            assert result.history == expected.history
            assert result.factors == expected.factors
            assert journal_of(again).read_bytes() == content


def test_a_finished_run_measures_nothing_again(
    shared_model, documents, uninterrupted, tmp_path, monkeypatch
):
    out, expected = uninterrupted
    journal_of(tmp_path).write_bytes(journal_of(out).read_bytes())
    monkeypatch.setattr(run.PopulationEvaluator, "__call__", None)
    assert search(shared_model, documents, out=tmp_path).history == expected.history


def test_batches_are_those_of_the_first_run(shared_model, documents, tmp_path, monkeypatch):
    """What memory is free after a restart must not change the bits of later values."""
    monkeypatch.setattr(run, "plan_batches", lambda *_, **__: BatchPlan(6, 10))
    expected = search(shared_model, documents, out=tmp_path)
    content = journal_of(tmp_path).read_bytes()
    notes = json.loads(content.splitlines()[0])["notes"]
    assert (notes["rows"], notes["chunk"]) == (6, 10)
    journal_of(tmp_path).write_bytes(b"".join(content.splitlines(keepends=True)[:6]))
    monkeypatch.setattr(run, "plan_batches", lambda *_, **__: BatchPlan(2, None))
    assert search(shared_model, documents, out=tmp_path).history == expected.history
    assert journal_of(tmp_path).read_bytes() == content


def test_the_rank_with_least_memory_decides_the_batches(shared_model, monkeypatch):
    monkeypatch.setattr(run, "plan_batches", lambda *_, **__: BatchPlan(4, None))
    monkeypatch.setattr(run, "plan_backward", lambda *_: BackwardPlan(checkpointed_layers=True))
    others = [
        (BatchPlan(2, None), BackwardPlan()),
        (BatchPlan(2, 512), BackwardPlan(chunk=512)),
        (BatchPlan(2, 1024), BackwardPlan(chunk=1024)),
    ]

    class Job:
        size = 4

        def gather(self, value):
            return [value, *others]

    asked = SearchOptions(target_length=4096)
    notes = run._notes(shared_model, asked, Job())
    assert (notes["rows"], notes["chunk"], notes["gradient"]) == (2, 512, (False, 512))
    others[1:] = []
    assert run._notes(shared_model, asked, Job())["gradient"] == (True, None)


def test_a_window_that_does_not_fit_names_the_target_length(shared_model, documents, monkeypatch):
    monkeypatch.setattr(memory, "CPU_TOKENS_PER_BATCH", 8)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"target_length: .* of 32 tokens, .* where 1000 are free"):
        search(shared_model, documents)


def test_a_finished_run_goes_on_with_more_iterations(shared_model, documents, tmp_path):
    expected = search(shared_model, documents, out=tmp_path / "long", iterations=6)
    search(shared_model, documents, out=tmp_path / "short", iterations=3)
    result = search(shared_model, documents, out=tmp_path / "short", iterations=6)
    assert result.history == expected.history
    assert journal_of(tmp_path / "short").read_bytes() == journal_of(tmp_path / "long").read_bytes()
    with pytest.raises(ValueError, match="holds more evaluations than this budget allows"):
        search(shared_model, documents, out=tmp_path / "short", iterations=2)


def test_a_smaller_budget_is_refused_without_validation_windows_too(
    shared_model, documents, tmp_path
):
    few = [d[:32] for d in documents[:2]]  # the search windows alone
    search(shared_model, few, out=tmp_path, iterations=4)
    before = (tmp_path / "history.csv").read_bytes()
    with pytest.raises(ValueError, match="holds more evaluations than this budget allows"):
        search(shared_model, few, out=tmp_path, iterations=2)
    assert (tmp_path / "history.csv").read_bytes() == before


def test_a_killed_process_loses_nothing(shared_model, documents, uninterrupted, tmp_path):
    """SIGKILL right after a batch was measured, before and after its line is written."""
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

            append, calls = Journal.append, []

            def append_and_die(self, entries):
                calls.append(len(entries))
                if sum(calls) >= 9:
                    self._file.write(b'{{"role": "search", "itera')
                    self._file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                append(self, entries)

            Journal.append = append_and_die
            documents = torch.load({str(tmp_path / "documents.pt")!r}, weights_only=True)
            longrope.search(
                tiny_search.build_model(), documents, out={str(tmp_path / "out")!r}, **{SMALL!r}
            )
        """)
    )
    torch.save(documents, tmp_path / "documents.pt")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = journal_of(tmp_path / "out").read_text()
    assert left.endswith('"itera')
    assert 3 < len(left.splitlines()) < 20
    result = search(shared_model, documents, out=tmp_path / "out")
    assert result.history == uninterrupted[1].history
    assert result.factors == uninterrupted[1].factors


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"population": 7}, "sizes.population: 6 there, 7 here"),
        ({"target_length": 34}, "target_length: 32 there, 34 here"),
        ({"attention_factor": 1.5}, "attention_factor: 1.069"),
        ({"start_tokens": 0}, "start_tokens: [0, 1, 2"),
        ({"max_lambda": 3.0}, "max_lambda, in hundredths: 250 there, 300 here"),
        ({"samples": 1}, "search windows, of documents and samples: "),
        ({"documents": "others"}, "search windows, of documents and samples: "),
    ],
)
def test_the_journal_of_another_search_is_refused(
    shared_model, documents, uninterrupted, changes, difference
):
    out, _ = uninterrupted
    given = documents
    if "documents" in changes:
        given, changes = [d + (d == 0).long() for d in documents], {}
    before = journal_of(out).read_bytes()
    with pytest.raises(ValueError) as raised:
        search(shared_model, given, out=out, **changes)
    assert "is the journal of another search" in str(raised.value)
    assert difference in str(raised.value)
    assert journal_of(out).read_bytes() == before


def test_another_model_is_refused_and_starting_again_is_possible(
    model, documents, uninterrupted, tmp_path
):
    content = journal_of(uninterrupted[0]).read_bytes()
    journal_of(tmp_path).write_bytes(content)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    with pytest.raises(ValueError, match=r"another search \(model: "):
        search(model, documents, out=tmp_path)
    result = search(model, documents, out=tmp_path, resume=False)
    assert len(journal_of(tmp_path).read_text().splitlines()) == 1 + len(result.history)
    assert journal_of(tmp_path / "previous-1").read_bytes() == content


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "annealing"}, "method: expected one of 'evolution', 'gradient', 'hybrid', got"),
        ({"objective": "bleu"}, "objective: expected one of 'perplexity', 'needle', got 'bleu'"),
        ({"preset": "mine"}, "preset: expected one of 'paper', 'paper-long', 'official-code', got"),
        ({"target_length": 16}, "target_length: expected more than the original length 16, got 16"),
        ({"target_length": 32.5}, "target_length: expected an integer of at least 2, got 32.5"),
        ({"original_length": 0}, "original_length: expected an integer of at least 2, got 0"),
        ({"target_length": 71}, r"documents\[0\]: expected at least 71 tokens, got 70"),
        ({"validation": [[1] * 31]}, r"validation\[0\]: expected at least 32 tokens, got 31"),
        ({"validation": []}, "validation: expected at least one document"),
        ({"start_tokens": "all"}, "start_tokens: expected 'search' or an integer"),
        ({"start_tokens": -1}, "start_tokens: expected 'search' or an integer"),
        ({"attention_factor": "none"}, "attention_factor: expected 'yarn', 'su', 'search' or a"),
        ({"attention_factor": 0.0}, "attention_factor: expected 'yarn', 'su', 'search' or a"),
        ({"max_lambda": 1.0}, "max_lambda: expected a finite number above 1, got 1.0"),
        ({"max_lambda": math.nan}, "max_lambda: expected a finite number above 1, got nan"),
        ({"max_lambda": math.inf}, "max_lambda: expected a finite bound with method='evolution'"),
        ({"samples": 0}, "samples: expected an integer of at least 1, got 0"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"max_evaluations": 0}, "max_evaluations: expected an integer of at least 1, got 0"),
        ({"population": -3}, "population: expected an integer of at least 1, got -3"),
    ],
)
def test_bad_input_is_one_sentence(shared_model, documents, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        search(shared_model, documents, **changes)


def test_an_unwritable_folder_is_named(shared_model, documents, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: cannot write to '.*file.below' \("):
        search(shared_model, documents, out=tmp_path / "file" / "below")


def test_a_model_without_rope_is_refused(documents):
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    with pytest.raises(ValueError, match="model: expected a model with rotary position embedding"):
        search(gpt2, documents)


def test_nan_weights_are_an_error_that_names_the_factors(model, documents):
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"model: its mean NLL at 32 tokens is nan .* 'pi'"):
        search(model, documents)


def test_a_candidate_that_fails_ranks_last(shared_model, documents, tmp_path, monkeypatch):
    measure = run.PopulationEvaluator.__call__

    def sometimes_nan(self, candidates, windows):
        losses = measure(self, candidates, windows)
        return [
            math.nan if c.start_tokens > 4 else v for c, v in zip(candidates, losses, strict=True)
        ]

    monkeypatch.setattr(run.PopulationEvaluator, "__call__", sometimes_nan)
    more = {"population": 12, "iterations": 5}  # mutations beside the closed forms
    result = search(shared_model, documents, out=tmp_path, **more)
    failed = [e for e in result.history if e.start_tokens > 4]
    assert failed
    assert all(e.nll == e.perplexity == math.inf for e in failed)
    assert result.factors.start_tokens <= 4
    assert search(shared_model, documents, out=tmp_path, **more).history == result.history
