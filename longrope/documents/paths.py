"""Which files of a folder hold documents, and how the layouts of Hugging Face are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from longrope.documents.notes import Notes
from longrope.runs.folder import JOURNAL
from longrope.runs.journal import kind_of

#: What `datasets` writes beside its tables, in folders of `save_to_disk` and in its cache.
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
#: Files of a dataset's repository that are about it; by their beginning, in lower case.
_ABOUT = ("readme", "license", "licence", "dataset_info", "citation")


def files_of(folder: Path, notes: Notes) -> Iterator[Path]:
    """Yield the files of a folder in the order of their paths, sub-folders included.

    Links are followed, and every file is read once, however many links lead to it. Hidden files
    and folders are left out. Of a repository in the cache of the Hugging Face hub, the snapshot
    that is in use is read; of a dataset that `save_to_disk` wrote, the tables that its state names.
    The folder of a run of longrope is left out: a run in the folder of its documents resumes.
    """
    yield from _Walk(notes).folder(folder)


class _Walk:
    def __init__(self, notes: Notes):
        self.notes = notes
        self.seen: set[Path] = set()

    def folder(self, folder: Path) -> Iterator[Path]:
        """Yield the files below one folder."""
        if self._again(folder):
            self.notes.add("links to a folder that was read", folder.name)
            return
        names = {entry.name for entry in folder.iterdir()}
        if {"blobs", "snapshots"} <= names:
            yield from self._snapshot(folder)
        elif _SPLITS in names:
            yield from self._splits(folder)
        elif _STATE in names and _INFO in names:
            yield from self._tables(folder)
        else:
            yield from self._entries(folder, sorted(names), cached=_INFO in names)

    def _entries(self, folder: Path, names: list[str], cached: bool) -> Iterator[Path]:
        for name in names:
            path = folder / name
            if name.startswith("."):
                continue
            if path.is_dir():
                if name.endswith(".incomplete"):
                    self.notes.add("unfinished downloads", name)
                elif (path / JOURNAL).is_file() and kind_of(path / JOURNAL):
                    self.notes.add("run folders", name)
                else:
                    yield from self.folder(path)
            elif cached and name.startswith(("cache-", "tmp")):
                self.notes.add("cached transformations", name)
            elif not path.exists():
                self.notes.add("broken links", name)
            elif not path.is_file():  # opening a pipe waits for someone who writes
                self.notes.add("things that are neither file nor folder", name)
            elif (cached and name == _INFO) or name.endswith(".lock"):
                continue
            elif self._again(path):
                self.notes.add("links to a file that was read", name)
            else:
                yield path

    def _snapshot(self, folder: Path) -> Iterator[Path]:
        """Yield the files of a repository in the hub's cache, without its card."""
        snapshots = [path for path in sorted((folder / "snapshots").iterdir()) if path.is_dir()]
        main = folder / "refs" / "main"
        wanted = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
        found = [path for path in snapshots if path.name == wanted] or snapshots[-1:]
        if not found:
            raise ValueError(f"path: expected a snapshot in {str(folder)!r}, got none")
        if len(snapshots) > 1:
            self.notes.remark(f"read snapshot {found[0].name} of {len(snapshots)} in {folder.name}")
        for path in self.folder(found[0]):
            if path.parent == found[0] and path.name.lower().startswith(_ABOUT):
                self.notes.add("dataset cards", path.name)
            else:
                yield path

    def _splits(self, folder: Path) -> Iterator[Path]:
        content = _json(folder / _SPLITS)
        splits = content.get("splits")
        if not isinstance(splits, list) or not all(isinstance(s, str) for s in splits):
            raise ValueError(f"{folder / _SPLITS}: expected a list of splits")
        if len(splits) > 1:
            one = folder / splits[0]
            self.notes.remark(f"read the splits {', '.join(splits)} together ({one}: one alone)")
        for split in splits:
            yield from self.folder(folder / split)

    def _tables(self, folder: Path) -> Iterator[Path]:
        files = _json(folder / _STATE).get("_data_files")
        if not isinstance(files, list) or not files:
            raise ValueError(f"{folder / _STATE}: expected a list of tables")
        for file in files:
            path = folder / Path(str(file.get("filename") if isinstance(file, dict) else file)).name
            if not path.is_file():
                raise ValueError(f"{folder / _STATE}: expected the table {path.name}, found none")
            yield path

    def _again(self, path: Path) -> bool:
        real = path.resolve()
        again = real in self.seen
        self.seen.add(real)
        return again


def _json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSON file, got something else")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content
