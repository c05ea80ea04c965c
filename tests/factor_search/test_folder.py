"""The folder of a search: whose it is, and what it sets aside."""

import json

import pytest
from support import tiny_models

from longrope.factor_search import folder
from longrope.runs.journal import Journal

HEADER = {"seed": 0}
FILES = ("config.json", "factors.json", "history.csv", "search.png")


def begin(out):
    """Begin a search and write a file of each name, with the number of its journal's lines."""
    folder.prepare(out)
    with Journal(out / "journal.jsonl", HEADER, kind="search") as journal:
        journal.append([{"nll": 1.0}])
    for name in FILES:
        (out / name).write_text(f"ours: {name}")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path, name, resume):
    (tmp_path / name).write_text("theirs")
    with pytest.raises(ValueError, match=f"out: expected a new folder .* holds {name} and no jour"):
        folder.prepare(tmp_path, resume)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "theirs"


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("content", [b"\x93\n", b"shopping list", b'{"a": 1}\n', b'{"format": "x'])
def test_a_journal_of_something_else_is_refused_and_kept(tmp_path, content, resume):
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"journal\.jsonl is not the journal of a search"):
        folder.prepare(tmp_path, resume)
    assert (tmp_path / "journal.jsonl").read_bytes() == content


def test_a_header_that_was_cut_off_is_no_search_yet(tmp_path):
    begin(tmp_path / "whole")
    header = (tmp_path / "whole" / "journal.jsonl").read_bytes().split(b"\n")[0]
    for size in range(len(header)):
        out = tmp_path / str(size)
        out.mkdir()
        (out / "journal.jsonl").write_bytes(header[:size])
        folder.prepare(out)
        with Journal(out / "journal.jsonl", HEADER, kind="search"):
            pass
        assert (out / "journal.jsonl").read_bytes() == header + b"\n"


def test_results_beside_a_header_that_was_cut_off_are_kept(tmp_path):
    begin(tmp_path)
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"holds config\.json and no journal of a search"):
        folder.prepare(tmp_path)
    assert (tmp_path / "factors.json").read_text() == "ours: factors.json"


def test_every_search_that_is_not_resumed_is_set_aside(tmp_path):
    for number in range(1, 4):
        begin(tmp_path)
        (tmp_path / "notes.txt").write_text("of the user")
        content = (tmp_path / "journal.jsonl").read_bytes()
        folder.prepare(tmp_path, resume=False)
        aside = tmp_path / f"previous-{number}"
        assert {path.name for path in aside.iterdir()} == {*FILES, "journal.jsonl"}
        assert (aside / "journal.jsonl").read_bytes() == content
        assert (aside / "factors.json").read_text() == "ours: factors.json"
        assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"notes.txt"}


def test_a_search_that_is_running_is_not_set_aside(tmp_path):
    pytest.importorskip("fcntl")
    begin(tmp_path)
    with (
        Journal(tmp_path / "journal.jsonl", HEADER, kind="search"),
        pytest.raises(ValueError, match="another search is writing"),
    ):
        folder.prepare(tmp_path, resume=False)
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])["seed"] == 0


def test_a_path_that_is_none():
    with pytest.raises(ValueError, match="out: expected a path, got int"):
        folder.prepare(3)


def test_the_summary_names_the_point_that_was_chosen(tmp_path):
    chosen = tiny_models.factors(lambdas=[1.0, 1.5, *[4.0] * 6], attention_factor=1.25)
    other = {"hundredths": [100] * 8, "start_tokens": 0, "attention_factor": 1.25}
    own = other | {"hundredths": [100, 150, *[400] * 6]}
    header = {
        "method": "gradient", "objective": "perplexity", "seed": 0,
        "problem": {"original_length": 32, "target_length": 128},
    }  # fmt: skip
    entries = [
        {"role": "search", "origin": "yarn", **other, "nll": 2.0},
        {"role": "search", "origin": "gradient", **own, "nll": 1.0},
        {"role": "validation", "origin": "gradient", **other, "nll": 1.5},
        {"role": "validation", "origin": "gradient", **own | {"start_tokens": 4}, "nll": 1.4},
        {"role": "validation", "origin": "start", **own, "nll": 1.6},
    ]
    with Journal(tmp_path / "journal.jsonl", header, kind="search") as journal:
        journal.append(entries)
    facts = folder.summary(tmp_path)
    assert facts["best on the held-out windows"] == "perplexity 4.0552"
    chosen.save(tmp_path / "factors.json")
    facts = folder.summary(tmp_path)
    assert facts["chosen, on the search windows"] == "perplexity 2.7183, 7.3891 with YaRN"
    assert facts["chosen, on the held-out windows"] == "perplexity 4.9530, 4.0552 at best"
