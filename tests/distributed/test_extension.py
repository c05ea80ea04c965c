"""`longrope.extend` by many processes: one run, one folder, one error."""

import pytest
from support import extension_runs

from longrope import report

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(ranks):
    return ranks("extension", 2)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one process; without reports, as the jobs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "at_end", lambda out: None)
        return extension_runs.run(tmp_path_factory.mktemp("single"))


def numbers(table):
    return [float(cell) for cell in table.replace("|", " ").split() if cell.count(".") == 1]


def test_all_ranks_end_with_the_weights_and_the_table_of_one_process(found, single):
    assert found[0]["whole"] == found[1]["whole"]
    # A step's gradients are summed in another order.
    table = found[0]["whole"][1]
    assert numbers(table) == pytest.approx(numbers(single.measured.table()), rel=2e-3)


def test_the_folder_is_that_of_one_process(found, single, ranks):
    def files(place):
        return sorted(str(f.relative_to(place)) for f in place.rglob("*") if f.is_file())

    assert files(ranks.folder("extension", 2) / "whole") == files(single.folder)


def test_a_job_that_stopped_in_a_step_goes_on_to_the_same_bits(found, ranks):
    assert [rank["stopped"] for rank in found] == ["stopped", "stopped"]
    assert found[0]["resumed"] == found[0]["whole"] == found[1]["resumed"]
    place = ranks.folder("extension", 2)
    for name in extension_runs.RESULTS:
        assert (place / "cut" / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(found):
    for rank in found:
        assert rank["not finite"].startswith("finetune: expected a finite loss, got nan in step 1")
        assert "rows 0 to 1 (" in rank["not finite"]


def test_an_error_of_one_rank_in_a_step_does_not_keep_the_others_waiting(ranks):
    other, failed = ranks("extension_broken", 2)
    assert failed == {"error": "batch: broken on one rank", "kind": "ValueError"}
    assert other["kind"] == "LostRankError"
    assert other["error"] == (
        "a rank of the job is gone or does not answer, seen by rank 0; the same command resumes"
    )


def test_what_a_job_refuses(found):
    for rank in found:
        assert rank["batch"] == (
            "batch_size: expected a multiple of rows_per_pass (1) times the number of ranks (2), "
            "got 3"
        )
        assert rank["sharded"].startswith("finetune: expected whole weights on every rank")
