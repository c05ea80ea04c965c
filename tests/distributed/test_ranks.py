"""A search by many processes: the result of one, its errors on all, and nothing lost."""

import json
import runpy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import jobs

from longrope._validation import first_difference
from longrope.distributed import ranks as ranks_module
from longrope.distributed.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = pytest.mark.parametrize("size", [2, 4])
LOST = "a rank of the job is gone or does not answer, seen by rank "


def journal_of(folder):
    return (folder / "journal.jsonl").read_bytes()


def errors(ranks, name, size):
    """Return the errors, one on each rank, of a search of the scenario `searches`."""
    found = [rank[name] for rank in ranks("searches", size)]
    assert all("error" in f for f in found), found
    return [f["error"] for f in found]


# --- the result of one process ----------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("name", ["evolution", "gradient", "one window", "race"])
def test_every_rank_finds_what_one_process_finds(ranks, alone, name, size):
    for rank in ranks("searches", size):
        assert rank[name] == alone[1][name]


@SIZES
def test_the_journal_is_that_of_one_process(ranks, alone, size):
    folder = ranks.folder("searches", size)
    for written, name in (
        ("out", "evolution"),
        ("cut", "evolution"),
        ("descent", "gradient"),
        ("race", "race"),
    ):
        lines = journal_of(folder / written).splitlines()
        expected = journal_of(alone[0] / name).splitlines()
        assert lines[1:] == expected[1:]
        assert first_difference(json.loads(expected[0]), json.loads(lines[0])) is None
    assert sorted(p.name for p in (folder / "out").iterdir()) == sorted(
        p.name for p in (alone[0] / "evolution").iterdir()
    )


@SIZES
def test_a_journal_cut_in_a_batch_is_resumed_to_the_same_result(ranks, alone, size):
    for rank in ranks("searches", size):
        assert rank["resumed"] == alone[1]["evolution"]


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, barrier, box):
        self.rank, self.size, self.barrier, self.box = rank, size, barrier, box

    def gather(self, value):
        self.box[self.rank] = value
        self.barrier.wait(timeout=60)
        return list(self.box)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", range(8))
def test_each_task_is_done_once_by_its_rank_and_comes_back_in_its_place(size, count):
    barrier, box, done = threading.Barrier(size), [None] * size, [[] for _ in range(size)]

    def be(rank):
        tasks = [lambda task=task: done[rank].append(task) or str(task) for task in range(count)]
        return Threads(rank, size, barrier, box).share(tasks)

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(be, range(size)))
    assert results == [[str(task) for task in range(count)]] * size
    assert done == [list(range(rank, count, size)) for rank in range(size)]


# --- one error for all ------------------------------------------------------------------------


@SIZES
def test_ranks_with_other_arguments_are_named_with_the_difference(ranks, size):
    last = size - 1
    expected = (
        "ranks: expected the same model, documents and settings on every rank, got others than "
        f"rank 0's on rank {last} (seed: 0 on rank 0, 1 on rank {last})"
    )
    assert errors(ranks, "another seed", size) == [expected] * size
    assert not (ranks.folder("searches", size) / "none").exists()
    told = errors(ranks, "another per", size)
    named = expected.replace("seed: 0", 'per: "model"').replace(", 1 on", ', "head" on')
    assert told == [named] * size
    others = ", ".join(str(rank) for rank in range(1, size))
    for name, key in (("other documents", "data.search"), ("another model", "model")):
        told = errors(ranks, name, size)
        assert len(set(told)) == 1
        assert f"on rank{'s' if size > 2 else ''} {others} ({key}: " in told[0]


@SIZES
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bad on one", "rank 1: population: expected an integer of at least 1, got -3"),
        ("bad on all", "population: expected an integer of at least 1, got -3"),
        ("not finite", "model: its mean NLL at 32 tokens is nan with the factors 'pi'"),
        (
            "another journal",
            "is the journal of another search (sizes.population: 6 there",
        ),
        ("no folder", "out: cannot write to '"),
        ("sharded on whole", "is the journal of another search (shard_sequence: null there, "),
        ("sharded gradient", "shard_sequence: expected False with method='gradient'"),
        ("too short to shard", "target_length: expected at least {even} tokens to shard over "),
    ],
)
def test_an_error_ends_all_ranks_with_one_sentence(ranks, name, sentence, size):
    told = errors(ranks, name, size)
    assert len(set(told)) == 1
    assert sentence.format(even=2 * size) in told[0]
    assert "\n" not in told[0]
    kinds = {rank[name]["kind"] for rank in ranks("searches", size)}
    assert kinds == {"JournalError" if "journal of another" in told[0] else "ValueError"}


def test_the_timeout_is_a_number_of_seconds(monkeypatch):
    monkeypatch.setenv("LONGROPE_RANK_TIMEOUT", "90.5")
    assert ranks_module.timeout().total_seconds() == 90.5
    for wrong in ("soon", "0", "inf"):
        monkeypatch.setenv("LONGROPE_RANK_TIMEOUT", wrong)
        with pytest.raises(ValueError, match="LONGROPE_RANK_TIMEOUT: expected a number of seconds"):
            ranks_module.timeout()


def test_one_process_alone_cannot_shard(shared_model, documents):
    found = jobs.search(documents, shared_model, **jobs.SMALL, shard_sequence=True)
    assert found["error"] == (
        "shard_sequence: expected a torch.distributed job of 2 ranks or more, got 1"
    )


# --- a rank that is gone ----------------------------------------------------------------------


@SIZES
def test_a_killed_rank_ends_the_others_and_the_journal_is_resumed(ranks, alone, size):
    job = ranks("killed", size)
    out = ranks.folder("killed", size) / "out"
    assert job[1] is None
    for rank, found in enumerate(job):
        if rank == 1:
            continue
        assert found["kind"] == "LostRankError"
        assert found["error"] == (
            f"{LOST}{rank}; the journal '{out / 'journal.jsonl'}' is complete up to its last line: "
            "start the same command again to resume"
        )
    left, whole = journal_of(out), journal_of(alone[0] / "evolution")
    assert left.endswith(b"\n")
    assert 1 < left.count(b"\n") < whole.count(b"\n")
    assert jobs.search(**jobs.SMALL, out=out) == alone[1]["evolution"]
    assert journal_of(out).splitlines()[1:] == whole.splitlines()[1:]


def test_a_rank_that_stands_still_ends_the_job(ranks):
    first, _ = ranks("stopped", 2)
    assert first["error"] == f"{LOST}0; nothing was kept, because out was None"


# --- the command ------------------------------------------------------------------------------


def test_the_command_joins_the_job_and_the_first_rank_speaks(ranks):
    first, second = ranks("command", 2)
    assert (first["code"], second["code"]) == (0, 0), (first, second)
    assert "perplexity" in first["out"]
    assert f"factors in {ranks.folder('command', 2) / 'run' / 'factors.json'}" in first["out"]
    assert "perplexity" in first["err"]  # the progress bar
    assert second["out"] == second["err"] == ""


def test_the_command_says_once_what_is_wrong(ranks):
    first, second = ranks("command_refused", 2)
    assert (first["code"], second["code"]) == (2, 2)
    assert first["err"] == "longrope: --samples: expected an integer of at least 1, got 0\n"
    assert second["err"] == ""


def test_the_command_ends_with_a_sentence_when_a_rank_is_gone(ranks):
    first, second = ranks("command_killed", 2)
    assert second is None
    assert first["code"] == 1
    assert f"longrope: {LOST}0; the journal" in first["err"]
    assert "Traceback" not in first["err"]


def test_the_package_can_be_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["longrope", "search", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("longrope", run_name="__main__")
    assert end.value.code == 0
    assert "--shard-sequence" in capsys.readouterr().out
