"""The journal: durable, repaired after a crash, refused when it is of another search."""

import errno
import functools
import json

import pytest

from longrope.errors import JournalError
from longrope.runs import journal

Journal = functools.partial(journal.Journal, kind="search")

HEADER = {"seed": 0, "model": "abc", "sizes": {"population": 4, "parents": 2}}
ENTRIES = [{"n": n, "nll": 0.1 * n} for n in range(5)]


def written(path, header=HEADER):
    with Journal(path, header, {"rows": 3}) as kept:
        kept.append(ENTRIES[:2])
        kept.append(ENTRIES[2:])
    return path.read_bytes()


def test_entries_come_back_in_order_with_the_notes_of_the_first_run(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    with Journal(path, HEADER, {"rows": 99}) as kept:
        assert kept.notes == {"rows": 3}
        assert kept.peek(2) == ENTRIES[:2]
        kept.skip(2)
        assert kept.peek(99) == ENTRIES[2:]
        kept.skip(3)
        assert kept.peek(1) == []
        kept.append([{"n": 5}])
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert all(len(line.pop("checksum")) == 8 for line in lines)
    assert lines == [*ENTRIES, {"n": 5}]


def test_a_file_cut_at_any_byte_gives_the_whole_lines_before_it(tmp_path):
    path = tmp_path / "journal.jsonl"
    content = written(path)
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n")
        with Journal(path, HEADER, {"rows": 3}) as kept:
            assert kept.peek(99) == ENTRIES[: max(0, whole - 1)]
        assert path.read_bytes() == content[: content[:size].rfind(b"\n") + 1] or whole == 0
        assert path.read_bytes().startswith(content[: content.find(b"\n") + 1])


def test_appending_drops_what_was_not_stepped_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    with Journal(path, HEADER) as kept:
        kept.skip(3)
        kept.append([{"n": "new"}])
        kept.append([{"n": "newer"}])
    with Journal(path, HEADER) as kept:
        assert kept.peek(99) == [*ENTRIES[:3], {"n": "new"}, {"n": "newer"}]


@pytest.mark.parametrize(
    ("header", "difference"),
    [
        ({**HEADER, "seed": 1}, "seed: 0 there, 1 here"),
        ({**HEADER, "sizes": {"population": 8, "parents": 2}}, "sizes.population: 4 there, 8 here"),
        ({**HEADER, "more": True}, "more: null there, true here"),
        ({"seed": 0, "sizes": HEADER["sizes"]}, 'model: "abc" there, null here'),
    ],
)
def test_the_journal_of_another_search_is_refused_by_name_and_kept(tmp_path, header, difference):
    path = tmp_path / "journal.jsonl"
    content = written(path)
    with pytest.raises(JournalError) as raised:
        Journal(path, header)
    assert difference in str(raised.value)
    assert path.read_bytes() == content


def test_another_file_is_refused_and_kept(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"shopping": "list"}\n')
    with pytest.raises(JournalError, match="format: null there"):
        Journal(path, HEADER)
    path.write_text("shopping list\n")
    with pytest.raises(JournalError, match=r"line 1 of .* is damaged"):
        Journal(path, HEADER)
    assert path.read_text() == "shopping list\n"


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = written(path).split(b"\n")
    lines[3] = lines[3][:4]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(JournalError, match=r"line 4 of .* is damaged"):
        Journal(path, HEADER)


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda lines: lines[2].__setitem__(slice(None), lines[2].replace(b"0.1", b"0.2")), 3),
        (lambda lines: lines[2].__setitem__(slice(None), lines[2].replace(b"0.1", b"NaN")), 3),
        (lambda lines: lines[2].__setitem__(slice(None), lines[2].replace(b"0.1", b"null")), 3),
        (lambda lines: lines[2].__setitem__(slice(None), b'{"n": 1, "nll": 0.1}'), 3),
        (lambda lines: lines[2].__setitem__(slice(None), b'["n", 1]'), 3),
        (lambda lines: lines[2].__setitem__(slice(None), b"[" * 100_000), 3),
        (lambda lines: lines[2].__setitem__(slice(None), b"9" * 5000), 3),
        (lambda lines: lines[2].__setitem__(slice(None), b'{"n": 1, "n": 1}'), 3),
        (lambda lines: lines[2].__setitem__(slice(None), b"\xff\xfe"), 3),
        (lambda lines: lines.pop(2), 3),
        (lambda lines: lines.insert(2, lines.pop(3)), 3),
        (lambda lines: lines[0].__setitem__(slice(None), lines[0].replace(b"abc", b"abd")), 1),
    ],
    ids=["altered", "NaN", "null", "no checksum", "list", "nested", "digits", "twice", "binary",
         "lost", "moved", "header"],
)  # fmt: skip
def test_an_altered_line_is_found_on_resume_and_on_reading(tmp_path, change, number):
    path = tmp_path / "journal.jsonl"
    lines = [bytearray(line) for line in written(path).split(b"\n")]
    change(lines)
    path.write_bytes(b"\n".join(lines))
    for attempt in (lambda: Journal(path, HEADER), lambda: journal.read(path)):
        with pytest.raises(JournalError, match=rf"line {number} of .* is damaged \(") as raised:
            attempt()
        assert "\n" not in str(raised.value)


def test_a_header_without_a_checksum_is_not_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"format": "longrope search journal 1"}\n')
    with pytest.raises(JournalError, match=r"line 1 of .* is damaged"):
        journal.read(path)


def test_the_checksums_go_on_after_lines_were_replaced(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    with Journal(path, HEADER) as kept:
        kept.skip(2)
        kept.append([{"n": "new"}])
    assert journal.read(path)[1] == [*ENTRIES[:2], {"n": "new"}]
    with Journal(path, {**HEADER, "seed": 0}) as kept:
        assert kept.peek(9) == [*ENTRIES[:2], {"n": "new"}]


def test_a_difference_is_said_in_the_words_given(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    with pytest.raises(JournalError, match=r"another search \(the seed: 0 there, 1 here\)"):
        Journal(path, {**HEADER, "seed": 1}, explain=lambda difference: "the " + difference)


def test_two_searches_cannot_write_one_journal(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "journal.jsonl"
    with Journal(path, HEADER), pytest.raises(JournalError, match="another search is writing"):
        Journal(path, HEADER)
    Journal(path, HEADER).close()


def test_values_survive_to_the_bit(tmp_path):
    path = tmp_path / "journal.jsonl"
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308]
    with Journal(path, HEADER) as kept:
        kept.append([{"nll": value} for value in values])
        with pytest.raises(ValueError, match="not JSON compliant"):
            kept.append([{"nll": float("nan")}])
    with Journal(path, HEADER) as kept:
        assert [entry["nll"] for entry in kept.peek(9)] == values


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(JournalError, match=r"cannot lock .* \(Function not implemented\)"):
        Journal(tmp_path / "journal.jsonl", HEADER)
