"""Folders as they come: links, several paths, and the layouts of Hugging Face."""

import json
import os
import socket
import threading

import numpy as np
import pytest

import longrope
from longrope.runs.journal import Journal


def texts(documents):
    return [bytes(d.astype(np.uint8)).decode() for d in documents]


def loaded(*arguments, **options):
    """Return the texts and the one warning, or ""."""
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = texts(longrope.load_data(*arguments, **options))
    assert len(said) <= 1
    return found, str(said[0].message).removeprefix("load_data: ") if said else ""


def test_several_paths_are_read_in_their_order(tmp_path):
    (tmp_path / "b.txt").write_text("first")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("second")
    assert loaded([tmp_path / "b.txt", str(tmp_path / "sub")]) == (["first", "second"], "")
    with pytest.raises(FileNotFoundError, match=r"path: there is no file or folder '.*none'"):
        longrope.load_data([tmp_path / "b.txt", tmp_path / "none"])
    with pytest.raises(ValueError, match="path: expected a file or folder, got none"):
        longrope.load_data([])


def test_links_are_followed_and_nothing_is_read_twice(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("linked")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("own")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "twin.txt").symlink_to(folder / "b.txt")
    (folder / "zero.txt").symlink_to(tmp_path / "nowhere")
    assert loaded(folder) == (
        ["own", "linked"],
        "left out 1 link to a folder that was read (loop), 1 link to a file that was read "
        "(twin.txt), 1 broken link (zero.txt)",
    )


@pytest.fixture
def special(tmp_path, monkeypatch):
    """Return a function that makes a socket, which cannot be opened, in the working folder."""
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 108 bytes
    made = []

    def make(name):
        made.append(socket.socket(socket.AF_UNIX))
        made[-1].bind(name)

    yield make
    for one in made:
        one.close()


def test_pipes_and_sockets_are_left_out_of_a_folder(tmp_path, special):
    (tmp_path / "a.txt").write_text("text")
    special("b.txt")
    assert loaded(tmp_path) == (
        ["text"], "left out 1 thing that is neither file nor folder (b.txt)",
    )  # fmt: skip
    os.mkfifo(tmp_path / "c.txt")
    (tmp_path / "d.txt").symlink_to(tmp_path / "c.txt")
    (tmp_path / "e").mkdir()
    os.mkfifo(tmp_path / "e" / "journal.jsonl")
    assert loaded(tmp_path) == (
        ["text"], "left out 4 things that are neither file nor folder (b.txt, c.txt, d.txt, ...)",
    )  # fmt: skip
    for path in (tmp_path / "b.txt", "/dev/null"):
        with pytest.raises(ValueError, match=r"path: expected a file, .* a socket or device"):
            longrope.load_data(path)


def test_the_folder_of_a_run_among_documents_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "run").mkdir()
    with Journal(tmp_path / "run" / "journal.jsonl", {}, {}, kind="search"):
        (tmp_path / "run" / "table.md").write_text("a table")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "journal.jsonl").write_text('{"text": "of a line"}\n')
    assert loaded(tmp_path) == (["text", "of a line"], "left out 1 run folder (run)")


def test_a_pipe_that_is_named_is_read(tmp_path):
    pipe = tmp_path / "c"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("text",))
    writer.start()
    assert [bytes(document) for document in longrope.load_data(pipe)] == [b"text"]
    writer.join()


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_layout_in_a_socket_is_refused(tmp_path, special, name):
    (tmp_path / "dataset_info.json").write_text("{}")
    special(name)
    with pytest.raises(ValueError, match=rf"{name}: expected a JSON file"):
        longrope.load_data(tmp_path)


def test_what_is_left_out_is_counted_and_the_first_are_named(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.bin").write_bytes(b"\0")
    (tmp_path / "settings.json").write_text('{"a": 1}')
    (tmp_path / "text.txt").write_text("text")
    assert loaded(tmp_path) == (
        ["text"], "left out 6 files that are not text (0.bin, 1.bin, 2.bin, ...)",
    )  # fmt: skip


def test_a_dataset_that_was_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["one", "two", "three"]})
    data.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-12.arrow").write_bytes(b"a transformation")
    assert loaded(tmp_path / "one") == (["one", "two", "three"], "")
    both = datasets.DatasetDict({"train": data, "test": data.select([0])})
    both.save_to_disk(tmp_path / "both")
    found, said = loaded(tmp_path / "both")
    assert found == ["one", "two", "three", "one"]
    assert said.startswith("read the splits train, test together (")
    assert loaded(tmp_path / "both" / "test") == (["one"], "")


def test_the_cache_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    data = datasets.load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache")
    )["train"]
    data.map(lambda row: {"text": row["text"].upper()})
    found, said = loaded(tmp_path / "cache")
    assert found == ["one", "two"]
    assert said.startswith("left out 1 cached transformation (cache-")


def test_the_cache_of_the_hub(tmp_path):
    repository = tmp_path / "datasets--org--name"
    for part in ("blobs", "refs", "snapshots/old", "snapshots/new/data"):
        (repository / part).mkdir(parents=True)
    for name, content in (("1", "old"), ("2", "new"), ("3", "a card")):
        (repository / "blobs" / name).write_text(json.dumps({"text": content}))
    (repository / "snapshots/old/a.jsonl").symlink_to(repository / "blobs/1")
    (repository / "snapshots/new/data/a.jsonl").symlink_to(repository / "blobs/2")
    (repository / "snapshots/new/README.md").symlink_to(repository / "blobs/3")
    (repository / "refs/main").write_text("new")
    assert loaded(repository) == (
        ["new"],
        "left out 1 dataset card (README.md); read snapshot new of 2 in datasets--org--name",
    )
    assert loaded(repository / "snapshots/old") == (["old"], "")


@pytest.mark.parametrize(
    ("name", "content"),
    [("state.json", "[]"), ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}'),
     ("dataset_dict.json", '{"splits": 3}'), ("dataset_dict.json", "[" * 100_000)],
)  # fmt: skip
def test_a_damaged_layout_is_refused_in_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{name}: expected") as raised:
        longrope.load_data(tmp_path)
    assert "\n" not in str(raised.value)
