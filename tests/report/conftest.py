"""The folders of runs that the tests of this room share."""

import pytest
from support import run_folders
from support.threads import threads

from longrope.report import writing


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder of every kind of run, by its name, with its report."""
    with threads(1):
        return run_folders.all_kinds(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def undrawn(monkeypatch):
    """Write reports without their plots, which take nearly all of the time."""
    image = writing._Image("data:,", 1, 1, "plots/x.pdf")
    monkeypatch.setattr(writing, "_drawn", lambda out, figure: image)
