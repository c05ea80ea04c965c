"""The journal of a search: one JSON line per evaluation, durable before the search goes on.

A search is a deterministic function of its header (model, data, settings, seed) and of the
values it measured. So a run resumes by running again from the start and taking values from the
journal, in order, for as long as they last: no random state is stored, and the continued run is
the uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from longrope._validation import first_difference
from longrope.errors import JournalError

FORMAT = "longrope search journal 1"


class Replay:
    """The entries of an earlier run, in order; what is appended is kept by somebody else.

    What the ranks of a job have that do not keep the journal.

    Parameters
    ----------
    path
        Of the journal, for messages.
    notes
        As in `Journal`.
    entries
        What the journal held when it was opened.
    """

    def __init__(self, path: Path, notes: dict[str, Any], entries: list[dict[str, Any]]):
        self.path = path
        self.notes = notes
        self._pending = entries
        self._read = 0  # how many of the pending entries were replayed

    @property
    def pending(self) -> list[dict[str, Any]]:
        """The entries of an earlier run that were not stepped over."""
        return self._pending[self._read :]

    def peek(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` of the next entries of an earlier run."""
        return self._pending[self._read : self._read + count]

    def skip(self, count: int) -> None:
        """Step over `count` entries of an earlier run: they stay."""
        self._read += count

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Drop the entries of an earlier run that were not stepped over."""
        self._pending, self._read = [], 0


class Journal(Replay):
    """An append-only file of JSON lines: a header, then one line per evaluation.

    Lines are written, flushed and fsynced together per call of `append`, the unit of work that a
    resumed search may have to redo. A last line without its newline was cut off by a crash and is
    dropped. The file is locked while it is open: two searches cannot write the same one.

    Parameters
    ----------
    path
        The journal file; its folder must exist.
    header
        JSON values that identify the search. A journal with another header is refused with the
        first difference named.
    notes
        JSON values of the first run that a resumed one need not share (`journal.notes` has them):
        how evaluations were batched, which a resumed run must take over because the bits of a
        value can depend on it, and versions.
    explain
        Words a difference for people.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        notes: dict[str, Any] | None = None,
        explain: Callable[[str], str] = str,
    ):
        self.path = path = Path(path)
        # Through JSON, so that it compares equal to what was read back (tuples become lists).
        header = json.loads(json.dumps({"format": FORMAT, **header, "notes": notes or {}}))
        self._file = _open_locked(path)
        try:
            lines = self._complete_lines()
            if lines:
                old = self._parse(lines[0], 1)
                notes = old.get("notes", {})
                difference = first_difference({**old, "notes": None}, {**header, "notes": None})
                if difference:
                    raise JournalError(
                        f"out: {self.path} is the journal of another search "
                        f"({explain(difference)}); choose another folder, or resume=False "
                        "(--no-resume) to start again"
                    )
            else:
                notes = header["notes"]
                self._write([header])
                _fsync_folder(self.path.parent)
            entries = [self._parse(line, n) for n, line in enumerate(lines[1:], 2)]
            self._sizes = [len(line) + 1 for line in lines]
        except BaseException:
            self.close()
            raise
        super().__init__(path, notes, entries)

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Write entries durably after those stepped over; earlier ones not stepped over go."""
        if self._read < len(self._pending):
            self._file.truncate(sum(self._sizes[: 1 + self._read]))
        super().append(entries)
        self._write(entries)

    @staticmethod
    def locked(path: Path) -> contextlib.closing:
        """Hold the lock of an existing journal inside a `with` block."""
        return contextlib.closing(_open_locked(path))

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _write(self, entries: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _complete_lines(self) -> list[bytes]:
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            self._file.truncate(len(complete))
        return complete.split(b"\n")[:-1]

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError
        except ValueError:
            raise JournalError(
                f"out: line {number} of {self.path} is damaged; "
                "remove it and the lines after it, or choose another folder"
            ) from None
        return entry


def is_begun(path: Path) -> bool:
    """Say whether there is a journal whose header was written; one that was cut off is none.

    Raises `JournalError` where the file is something else.
    """
    try:
        with open(path, "rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return False
    begin = json.dumps({"format": FORMAT})[:-1].encode()
    if not line.endswith(b"\n") and begin.startswith(line[: len(begin)]):
        return False  # killed while the header was written
    if not line.startswith(begin):
        raise JournalError(f"out: {path} is not the journal of a search; choose another folder")
    return True


def _open_locked(path: Path) -> BinaryIO:
    file = open(path, "a+b")  # noqa: SIM115 (closed by the caller)
    try:
        _lock(file)
    except BlockingIOError:
        file.close()
        raise JournalError(f"out: another search is writing to {path}") from None
    except OSError as error:
        file.close()
        raise JournalError(
            f"out: cannot lock {path} ({error.strerror}); choose a folder on another file system"
        ) from None
    return file


def _lock(file: BinaryIO) -> None:
    """Lock a file for this process; the lock ends with the process, also when it is killed."""
    try:
        import fcntl
    except ImportError:  # Windows has no advisory locks of this kind
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _fsync_folder(folder: Path) -> None:
    """Make the new file's name durable too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
