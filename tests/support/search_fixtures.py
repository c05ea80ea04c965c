"""Fixtures of the tests that search: the tiny model, its documents, jobs of many ranks."""

import numpy as np
import pytest

from support import jobs, tiny_models
from support.threads import threads
from support.tiny_search import build_documents, build_model


@pytest.fixture(scope="session")
def shared_model():
    """The model, for tests that leave it as it is."""
    return build_model()


@pytest.fixture
def model():
    """A model of the test's own."""
    return build_model()


@pytest.fixture(scope="session")
def documents():
    """Eight documents of 70 tokens: two windows of 32 each."""
    return build_documents()


@pytest.fixture(scope="session")
def alone(tmp_path_factory, shared_model, documents):
    """What one process finds where the jobs of `support.jobs` search: the folder, and by name."""
    folder = tmp_path_factory.mktemp("alone")
    with threads(1):
        found = {
            "evolution": jobs.search(**jobs.SMALL, out=folder / "evolution"),
            "gradient": jobs.search(**jobs.DESCENT, out=folder / "gradient"),
            "one window": jobs.search(**jobs.DESCENT | {"windows_per_step": 1}),
            "race": jobs.search(**jobs.RACED, out=folder / "race"),
        }
    return folder, found


@pytest.fixture(scope="session")
def ranks(tmp_path_factory, alone):
    """Run all jobs of `support.jobs` once; `ranks(scenario, size)` has what each rank came to.

    None for a rank that died. `ranks.folder(scenario, size)` has the job's files.
    """
    folder = tmp_path_factory.mktemp("jobs")
    tiny_models.build(vocab_size=256, pad_token_id=None).save_pretrained(folder / "model")
    text = np.random.default_rng(0).integers(97, 123, 2000, dtype=np.uint8)
    (folder / "text.txt").write_bytes(text.tobytes())
    started = jobs.Jobs(folder)
    journal = (alone[0] / "evolution" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for size in (2, 4):
        place = started.folder("searches", size)
        (place / "cut").mkdir(parents=True)
        # In the middle of the third batch of two.
        (place / "cut" / "journal.jsonl").write_bytes(b"".join(journal[:6]))
        (place / "file").write_text("")
    started.run()
    return started
