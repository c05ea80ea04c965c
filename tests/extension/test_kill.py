"""A run over all kinds of stages, killed again and again: the same bits in the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.extension_runs import RESULTS

import longrope


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    paths = [Path(longrope.__file__).parents[1], Path(__file__).parents[1]]
    done = subprocess.run(
        [sys.executable, "-m", "support.extension_runs", str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    return folder


def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(runs):
    assert int((runs / "lives").read_text()) >= 4
    for name in RESULTS:
        assert (runs / "killed" / name).read_bytes() == (runs / "whole" / name).read_bytes(), name


def test_what_a_kill_leaves_is_cleared_away(runs):
    def files(place):
        return sorted(str(f.relative_to(place)) for f in place.rglob("*") if f.is_file())

    assert files(runs / "killed") == files(runs / "whole")
