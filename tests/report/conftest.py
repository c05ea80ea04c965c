"""The folders of runs that the tests of this room share."""

import pytest
from support import run_folders
from support.threads import threads


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder of every kind of run, by its name, with its report."""
    with threads(1):
        return run_folders.all_kinds(tmp_path_factory.mktemp("runs"))
