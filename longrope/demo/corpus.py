"""The demo's text: the source files of Python's own standard library, as bytes.

Every Python installation carries this corpus, so the packaged model can be trained, searched and
measured without a download. Which files the model never saw in training is decided by a hash of
the module path alone: the rule holds for any Python version, also for modules added later.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np

#: Folders that hold tables or third-party code rather than library source.
EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "pydoc_data", "site-packages"}
)
#: Folders of the library's own tests, which many installations leave out: only training uses them.
TEST_FOLDERS = frozenset({"idle_test", "test", "tests"})

#: The files of the training run's interpreter that were held out, one `role path` a line.
HELD_OUT_LIST = Path(__file__).with_name("held_out.txt")


def role(module_path: str) -> str:
    """Say what a file is for: `"train"` (8 in 10), `"search"` (1 in 10) or `"test"` (1 in 10).

    `module_path` is the file's path below the standard library's folder with forward slashes, for
    example `"asyncio/base_events.py"`. The answer depends on nothing else.
    """
    bucket = hashlib.sha256(module_path.encode()).digest()[0] % 10
    return {0: "search", 1: "test"}.get(bucket, "train")


def source_files(
    wanted: str, stdlib: str | Path | None = None, *, with_tests: bool = False
) -> dict[str, Path]:
    """Return the standard library's source files of one role, `{module_path: file}`, sorted.

    `with_tests` adds those of the library's own tests, where the installation has them.

    Raises `FileNotFoundError` with one sentence where the interpreter has no library sources
    (some embedded and frozen distributions ship compiled files only).
    """
    root = Path(stdlib or sysconfig.get_paths()["stdlib"])
    excluded = EXCLUDED_FOLDERS if with_tests else EXCLUDED_FOLDERS | TEST_FOLDERS
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if excluded.isdisjoint(parts) and not parts[0].startswith("config-"):
            found["/".join(parts)] = path
    if not found:
        raise FileNotFoundError(
            f"the demo reads Python's own library sources, and {root} holds no .py files: "
            "use a Python installation that ships its standard library as source"
        )
    return {name: path for name, path in found.items() if role(name) == wanted}


def documents(
    wanted: str, min_length: int = 1, stdlib: str | Path | None = None, *, with_tests: bool = False
) -> list[np.ndarray]:
    """Read the files of one role as documents: int64 byte values, at least `min_length` long."""
    files = source_files(wanted, stdlib, with_tests=with_tests)
    texts = (path.read_bytes() for path in files.values())
    return [np.frombuffer(t, np.uint8).astype(np.int64) for t in texts if len(t) >= min_length]
