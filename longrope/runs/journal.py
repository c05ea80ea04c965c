"""The journal of a run: one JSON line per result, durable before the run goes on.

A run is a deterministic function of its header (model, data, settings, seed) and of the results
that it computed on the way. So it resumes by starting again and taking results from the journal,
in order, for as long as they last: no random state is stored, and the resumed run is the
uninterrupted one bit for bit.

Every line ends with a checksum of itself and of all lines before it. So a figure that was altered,
and a line that was lost or moved, is found before the run goes on from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from longrope._files import strict_json
from longrope._validation import first_difference
from longrope.errors import JournalError


class Replay:
    """The entries of an earlier run, in order, without a file to append to.

    The ranks of a job have one, except the first, which writes the `Journal`.

    Parameters
    ----------
    path
        Where the journal is, for messages.
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
        """The entries of an earlier run that were not skipped yet."""
        return self._pending[self._read :]

    def peek(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` of the next entries of an earlier run."""
        return self._pending[self._read : self._read + count]

    def skip(self, count: int) -> None:
        """Move past `count` entries of an earlier run; the journal keeps them."""
        self._read += count

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Drop the entries of an earlier run that were not skipped."""
        self._pending, self._read = [], 0


class Journal(Replay):
    """An append-only file of JSON lines: a header, then one line per result.

    The lines of one call of `append` are written, flushed and fsynced together: they are the unit
    of work that a resumed run may have to redo. A last line without its newline was cut off by a
    crash and is dropped. The file is locked while it is open: two runs cannot write the same one.

    Parameters
    ----------
    path
        The journal file; its folder must exist.
    header
        JSON values that identify the run. A journal with another header is refused, and the error
        names the first difference.
    notes
        JSON values that a resumed run need not share, but has to adopt: `journal.notes` are those
        of the first run. How work was batched, because the bits of a result can depend on it.
    kind
        What the run is, in one word: `"search"`. Part of the header and of messages.
    explain
        Puts a difference between two headers into the user's words.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        notes: dict[str, Any] | None = None,
        *,
        kind: str,
        explain: Callable[[str], str] = str,
    ):
        self.path = path = Path(path)
        # Through JSON, so that it compares equal to what was read back (tuples become lists).
        header = json.loads(json.dumps({"format": _format(kind), **header, "notes": notes or {}}))
        self._file = _open_locked(path, kind)
        self._failed = False
        try:
            lines = self._complete_lines()
            #: The checksum up to each line: that of the header first.
            self._checksums: list[int] = []
            if lines:
                parsed = _parsed(lines, self._checksums)
                old = self._unless_damaged(parsed)
                notes = old.get("notes", {})
                difference = first_difference({**old, "notes": None}, {**header, "notes": None})
                if difference:
                    raise JournalError(
                        f"out: {self.path} is the journal of another {kind} "
                        f"({explain(difference)}); choose another folder, or resume=False "
                        "(--no-resume) to start again"
                    )
                entries = [self._unless_damaged(parsed) for _ in lines[1:]]
            else:
                notes, entries = header["notes"], []
                self._write([header])
                _fsync_folder(self.path.parent)
            self._sizes = [len(line) + 1 for line in lines]
        except BaseException:
            self.close()
            raise
        super().__init__(path, notes, entries)

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Write entries durably after the skipped ones, in place of those that were not skipped."""
        if self._read < len(self._pending):
            self._file.truncate(sum(self._sizes[: 1 + self._read]))
            del self._checksums[1 + self._read :]
        super().append(entries)
        self._write(entries)

    @staticmethod
    def locked(path: Path, kind: str) -> contextlib.closing:
        """Hold the lock of an existing journal inside a `with` block."""
        return contextlib.closing(_open_locked(path, kind))

    def close(self) -> None:
        """Close the file and release its lock."""
        # What could not be written is written again by this, and fails again.
        with contextlib.suppress(OSError) if self._failed else contextlib.nullcontext():
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _write(self, entries: list[dict[str, Any]]) -> None:
        lines = []
        for entry in entries:
            line, checksum = _line(entry, self._checksums[-1] if self._checksums else 0)
            self._checksums.append(checksum)
            lines.append(line)
        try:
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._failed = True
            raise OSError(
                error.errno,
                f"out: cannot write {self.path} ({error.strerror}); what it holds is kept, and the "
                "same call resumes",
            ) from None

    def _complete_lines(self) -> list[bytes]:
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            self._file.truncate(len(complete))
        return complete.split(b"\n")[:-1]

    def _unless_damaged(self, parsed: Iterator[dict[str, Any]]) -> dict[str, Any]:
        try:
            return next(parsed)
        except _DamagedLineError as error:
            raise JournalError(
                f"out: line {error.number} of {self.path} is damaged ({error.reason}); "
                "remove it and the lines after it, or choose another folder"
            ) from None


class _DamagedLineError(ValueError):
    def __init__(self, number: int, reason: str):
        super().__init__(reason)
        self.number, self.reason = number, reason


#: What stands before the checksum, at the end of a line.
_MARK = b', "checksum": "'


def _line(entry: dict[str, Any], before: int) -> tuple[bytes, int]:
    """Return an entry as a line and the checksum up to it; `before` is that of the line before."""
    text = json.dumps(entry, allow_nan=False).encode()
    checksum = zlib.crc32(text, before)
    return text[:-1] + _MARK + b'%08x"}\n' % checksum, checksum


def _parsed(lines: Sequence[bytes], checksums: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the entries of complete lines, and append the checksum up to each."""
    for number, line in enumerate(lines, 1):
        text, mark, end = line.rpartition(_MARK)
        text += b"}"
        checksum = zlib.crc32(text, checksums[-1] if checksums else 0)
        try:
            entry = strict_json(text if mark else line)
            if not isinstance(entry, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            reason = f"no JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise _DamagedLineError(number, reason) from None
        if not mark and number > 1:
            raise _DamagedLineError(number, "it has no checksum")
        if mark and end != b'%08x"}' % checksum:
            raise _DamagedLineError(number, "its checksum is that of other figures")
        checksums.append(checksum)
        yield entry


def is_begun(path: Path, kind: str) -> bool:
    """Say whether there is a journal of this kind with a complete header.

    Raises `JournalError` where the file is something else.
    """
    try:
        with open(path, "rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return False
    first = json.dumps({"format": _format(kind)})[:-1].encode()
    if not line.endswith(b"\n") and first.startswith(line[: len(first)]):
        return False  # killed while the header was written
    if not line.startswith(first):
        raise JournalError(
            f"out: {path} is not the journal of {named(kind)}; choose another folder"
        )
    return True


def kind_of(path: Path) -> str | None:
    """Return what kind of run a journal is of; None where there is no journal that has begun."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
        header = strict_json(line) if line.endswith(b"\n") else {}
        form = re.fullmatch(r"longrope ([\w ]+) journal 1", str(header.get("format")))
    except (OSError, ValueError, AttributeError):  # the last of JSON that is no object
        return None
    return form[1] if form else None


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the complete entries of a journal, without its lock.

    Raises `JournalError` where a line is damaged.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        if not lines or _MARK not in lines[0]:
            raise _DamagedLineError(1, "it has no checksum")
        header, *entries = _parsed(lines, [])
    except _DamagedLineError as error:
        raise JournalError(f"line {error.number} of {path} is damaged ({error.reason})") from None
    return header, entries


def state(path: Path) -> str:
    """Return the checksum of a journal up to its last complete line."""
    complete = path.read_bytes().rpartition(b"\n")[0]
    return complete.rpartition(_MARK)[2].removesuffix(b'"}').decode()


def named(kind: str) -> str:
    """Return a kind of run with its article."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _format(kind: str) -> str:
    return f"longrope {kind} journal 1"


def _open_locked(path: Path, kind: str) -> BinaryIO:
    file = open(path, "a+b")  # noqa: SIM115 (closed by the caller)
    try:
        _lock(file)
    except BlockingIOError:
        file.close()
        raise JournalError(f"out: another {kind} is writing to {path}") from None
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
