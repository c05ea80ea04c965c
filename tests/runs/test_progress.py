"""Progress where nothing can be redrawn: lines in a log, and in a notebook without widgets."""

from __future__ import annotations

import importlib.util
import re

import pytest

from longrope.runs.progress import bar


def shown(capsys, seconds, **options):
    """Return the lines on standard error of a run whose units take these seconds."""
    now = [0.0]
    with bar(len(seconds), "perplexity", clock=lambda: now[0], **options) as update:
        for number, each in enumerate(seconds):
            now[0] += each
            update(1, 1000, f"{10 - number:.4f}")
    return capsys.readouterr().err.strip().splitlines()


def test_a_log_gets_a_line_every_half_minute(capsys):
    lines = shown(capsys, [10] * 10, unit="windows", ends_with_line=False)
    assert lines == [
        "longrope: 3 of 10 windows, perplexity 8.0000, 0.1k tokens/s, 0:00:30 so far, "
        "at most 0:01:10 left",
        "longrope: 6 of 10 windows, perplexity 5.0000, 0.1k tokens/s, 0:01:00 so far, "
        "at most 0:00:40 left",
        "longrope: 9 of 10 windows, perplexity 2.0000, 0.1k tokens/s, 0:01:30 so far, "
        "at most 0:00:10 left",
    ]


def test_what_is_over_at_once_leaves_a_log_empty_or_with_one_line(capsys):
    assert shown(capsys, [1, 1], ends_with_line=False) == []
    assert len(shown(capsys, [1, 1])) == 1


def test_hours_are_written_out(capsys):
    (line,) = shown(capsys, [3725], ends_with_line=False)
    assert "1:02:05 so far" in line


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_without_widgets_gets_lines(capsys, monkeypatch, widgets):
    import rich.console

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    real = importlib.util.find_spec

    def find(name, *rest):
        if name == "ipywidgets":
            return object() if widgets else None
        return real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    if widgets:  # rich draws, by IPython, which is not here
        monkeypatch.setattr("rich.progress.Progress.start", lambda self: None)
        monkeypatch.setattr("rich.progress.Progress.stop", lambda self: None)
    lines = shown(capsys, [20, 20])
    assert bool([line for line in lines if re.match("longrope: 2 of 2", line)]) is not widgets
