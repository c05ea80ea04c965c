"""The times of a run where its processes were killed."""

import pytest

from longrope.runs import times


def at(monkeypatch, hour):
    monkeypatch.setattr(times, "_now", lambda: f"2026-01-01T{hour:02}:00:00+00:00")


@pytest.mark.parametrize("kept", [0, 1, 20, -1], ids=["nothing", "a brace", "a half", "no newline"])
def test_a_line_that_a_kill_cut_off_takes_no_other_with_it(tmp_path, monkeypatch, kept):
    at(monkeypatch, 1)
    times.began(tmp_path)
    first = (tmp_path / times.TIMES).read_bytes()
    times.began(tmp_path)
    second = (tmp_path / times.TIMES).read_bytes()[len(first) :]
    (tmp_path / times.TIMES).write_bytes(first + second[:kept])
    at(monkeypatch, 5)
    times.began(tmp_path)
    at(monkeypatch, 7)
    times.ended(tmp_path)
    *killed, last = times.read(tmp_path)
    assert [times.seconds(entry) for entry in killed] == [None] * (2 if kept == -1 else 1)
    assert times.seconds(last) == 2 * 3600
    assert b"\n\n" not in (tmp_path / times.TIMES).read_bytes()
