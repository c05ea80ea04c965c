"""The progress bar: what it counts and what it calls speed."""

import re

import pytest

from longrope.factor_search.history import Evaluation
from longrope.factor_search.progress import progress_bar


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def evaluation(n, role="search", nll=1.0, windows=5):
    return Evaluation(role, 0, "mutation", (1.0, 1.0 + n), 0, nll, 1.0, windows)


def shown(capsys, batches, total=20):
    """Show `(evaluations, tokens, seconds later)` one after the other; return the last line."""
    now = [100.0]
    with progress_bar(True, total, clock=lambda: now[0]) as update:
        for evaluations, tokens, seconds in batches:
            now[0] += seconds
            update(evaluations, tokens)
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_counts_speed_and_the_best(capsys):
    batches = [
        ([evaluation(0, nll=2.0), evaluation(1, nll=1.0)], 30_000, 2),
        ([evaluation(2, nll=1.5)], 15_000, 1),
        ([evaluation(3, "validation", nll=0.5)], 5_000, 1),
    ]
    line = shown(capsys, batches)
    assert " perplexity 2.7183" in line
    assert "12.5k tokens/s" in line  # 50,000 in 4 seconds
    assert "4/4" in line  # the search was over before its most evaluations
    assert re.search(r"\d:\d\d:\d\d \+ \d:\d\d:\d\d left", line)


def test_a_line_of_80_columns_holds_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    batches = [([evaluation(n, nll=5.0) for n in range(1000)], 3_000_000, 20)] * 2
    line = shown(capsys, batches, total=9000)
    assert "perplexity 148.4132" in line and "150.0k tokens/s" in line
    assert "\u2026" not in line
    assert line.endswith("left")


def test_what_comes_from_a_journal_is_no_speed(capsys):
    replayed = [([evaluation(n)], 0, 0.001) for n in range(9)]
    line = shown(capsys, replayed)
    assert "- tokens/s" in line and "9/9" in line
    line = shown(capsys, [*replayed, ([evaluation(9)], 8_000, 0.991)])
    assert "8.0k tokens/s" in line and "10/10" in line


def test_a_candidate_in_a_race_counts_once(capsys):
    first = [evaluation(n, "race", windows=1) for n in range(4)]
    second = [evaluation(n, "race", windows=2) for n in range(3)]
    last = [evaluation(n, windows=2) for n in range(2)]
    judged = [evaluation(0, "validation")]
    line = shown(capsys, [(e, 1000, 1) for e in (first, second, last, judged)])
    assert "5/5" in line


def test_nothing_is_shown_where_not_asked_for(capsys):
    with progress_bar(False, 3) as update:
        update([evaluation(0)], 100)
    assert capsys.readouterr() == ("", "")
