"""The build backend: setuptools, built against the torch that the user already has.

pip builds a package in an isolated environment that holds what the package asks for, and a torch
asked for there is downloaded anew (gigabytes) and may be another one than the user's. This backend
looks into the interpreter that pip was started with instead: where torch is installed, nothing is
asked for and that torch is made importable during the build, behind everything of the isolated
environment. Where there is none, the newest is asked for, as for any other package.

Named by `[build-system]` in pyproject.toml; `setup.py` uses the checks below as well. Every refusal
is one sentence through `SystemExit`, which pip prints without a traceback.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SETUPTOOLS = (77, 0)  # the first that reads `license = "MIT"` (PEP 639)

try:
    import setuptools
    from setuptools import build_meta
    from setuptools.build_meta import (  # noqa: F401  (hooks that need nothing of ours)
        build_sdist,
        get_requires_for_build_sdist,
        prepare_metadata_for_build_editable,
        prepare_metadata_for_build_wheel,
    )
except ImportError:
    found = "there is none"
else:
    found = f"it has {setuptools.__version__}"
    if tuple(int(n) for n in re.findall(r"\d+", setuptools.__version__)[:2]) >= SETUPTOOLS:
        found = ""
if found:
    raise SystemExit(
        f"longrope: the build needs setuptools >= {SETUPTOOLS[0]} in this environment and {found}: "
        'run pip install "setuptools>=77" ninja, or leave out --no-build-isolation'
    )

#: The oldest minor of torch that longrope builds with, and the newest that it was tried with (the
#: table in CONTRIBUTING.md, which `.ci/torch_check.sh` fills).
TORCH_OLDEST, TORCH_NEWEST_TRIED = (2, 11), (2, 15)
#: What is asked for where there is no torch. Without an upper bound: with one, a new torch would be
#: hidden from everybody until the next release of longrope, and a new Python, whose first torch is
#: a new one, would get none at all. What is built is bound to its minor of torch either way.
TORCH = "torch>={}.{}".format(*TORCH_OLDEST)


# --- the user's torch ----------------------------------------------------------------------------

# Run in the user's interpreter: where it looks for modules, and which torch it has.
_QUESTION = """
import importlib.metadata, importlib.util, json, os, sys
paths = [p for p in sys.path if os.path.isdir(p)]
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    paths.append(os.path.dirname(os.path.dirname(spec.origin)))  # an editable torch
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = __import__("torch").__version__
else:
    torch = None
print(json.dumps({"abi": sys.implementation.cache_tag, "paths": paths, "torch": torch}))
"""


class _InterpreterModules:
    """Finds modules in the user's interpreter when nothing else has them (last on sys.meta_path).

    Not entries of sys.path, so that the plugins installed there (setuptools extensions, torch
    backends) stay out of the build.
    """

    def __init__(self, paths: list[str]):
        self.paths = paths

    def find_spec(self, name, path=None, target=None):
        if path is None:  # a top-level module; submodules are found through their package
            return importlib.machinery.PathFinder.find_spec(name, self.paths, target)
        return None


def _interpreters() -> list[str]:
    """The interpreters to ask: pip's own, then the active one (some front ends build in a venv)."""
    active = os.environ.get("VIRTUAL_ENV", "")
    scripts = ("Scripts/python.exe",) if os.name == "nt" else ("bin/python",)
    return [sys.executable] + [
        p for s in scripts if active and os.path.exists(p := f"{active}/{s}")
    ]


def _ask(interpreter: str) -> dict:
    # -E: pip's isolation works through PYTHONPATH and PYTHONNOUSERSITE, so ignoring the
    # environment shows the interpreter as the user has it.
    try:
        answer = subprocess.run(
            [interpreter, "-E", "-c", _QUESTION],
            cwd=Path(interpreter).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(answer.stdout.splitlines()[-1])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return {"torch": None}


def find_torch() -> str | None:
    """Return the version of the torch to build against and make it importable; None without one."""
    if importlib.util.find_spec("torch"):
        try:
            return importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:  # ours, found on an earlier call
            import torch

            return torch.__version__
    for interpreter in _interpreters():
        answer = _ask(interpreter)
        if answer["torch"] and answer["abi"] == sys.implementation.cache_tag:
            sys.meta_path.append(_InterpreterModules(answer["paths"]))
            return answer["torch"]
    return None


def minor(version: str) -> tuple[int, int]:
    """`"2.13.0+cpu"` -> `(2, 13)`."""
    return tuple(int(n) for n in version.split(".")[:2])


def check_torch(version: str) -> None:
    """Refuse a torch that is too old."""
    if minor(version) < TORCH_OLDEST:
        raise SystemExit(
            f"longrope: expected {TORCH}, and this interpreter has torch {version}: "
            f'run pip install "{TORCH}" first'
        )


def untried(version: str) -> str:
    """Return a sentence where this torch is newer than those that longrope was tried with."""
    if minor(version) <= TORCH_NEWEST_TRIED:
        return ""
    newest = ".".join(map(str, TORCH_NEWEST_TRIED))
    return f"torch {version} is newer than the newest that was tried, {newest}"


# --- the compiler --------------------------------------------------------------------------------


def compiler() -> list[str]:
    """Return the C++ compiler and its flags: `CXX`, else Python's own, else the usual names.

    Without ccache or sccache in front, which torch puts there itself where they are installed.
    """
    wanted = os.environ.get("CXX")
    candidates = [wanted] if wanted else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for command in filter(None, candidates):
        words = shlex.split(command)
        if len(words) > 1 and Path(words[0]).name in ("ccache", "sccache"):
            words = words[1:]
        if words and shutil.which(words[0]):
            return words
    raise SystemExit(
        "longrope: building it needs a C++ compiler and "
        + (f"CXX={wanted} is no program that can be run" if wanted else "none was found on PATH")
        + ": install one (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
        "macOS: xcode-select --install) or name one with CXX=..."
    )


def check_compiler() -> None:
    """Refuse where there is no C++ compiler or Python's own headers are missing."""
    if os.name == "nt":
        return  # found through the registry by setuptools
    compiler()
    include = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(include, "Python.h")):
        raise SystemExit(
            f"longrope: building it needs Python's C headers and {include}/Python.h is missing: "
            "install them (Debian and Ubuntu: apt install python3-dev; Fedora: dnf install "
            "python3-devel)"
        )


# --- the hooks of PEP 517 and PEP 660 ------------------------------------------------------------


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    check_compiler()  # before anything is downloaded
    version = find_torch()
    if version is None:
        return [TORCH]
    check_torch(version)
    return []


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    # Modules that were deleted since the last build would be packed again from here.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


build_editable = build_meta.build_editable
