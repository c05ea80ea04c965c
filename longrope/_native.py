"""Find and load the compiled extension `longrope._C`; loading it registers `torch.ops.longrope.*`.

`from longrope._native import _C` is the one way to it. The extension lies beside this file in an
installed package and after an in-place build. Python run inside a clone sees the source folder
`longrope/` first, which has no extension unless one was built in place: then the installed
package's is used, and a warning says so.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from pathlib import Path

import torch  # first: the extension is linked against the libraries that torch loads

__all__ = ["_C"]

NAME = "longrope._C"
HERE = Path(__file__).resolve().parent


def _find() -> Path:
    """Return the extension's file: beside this one, else the first installed package's."""
    folders = [HERE] + [Path(p or ".").resolve() / "longrope" for p in sys.path]
    for folder in folders:
        for suffix in EXTENSION_SUFFIXES:
            file = folder / f"_C{suffix}"
            if file.is_file():
                return file
    raise ImportError(
        f"{NAME}: the native extension is not built: run `pip install .` in {HERE.parent} (or, "
        "to build it in place, `python setup.py build_ext --inplace`)"
    )


def _load(file: Path):
    """Import `file` as `longrope._C`; refuse one that was built for another torch minor."""
    loader = ExtensionFileLoader(NAME, str(file))
    spec = importlib.util.spec_from_file_location(NAME, file, loader=loader)
    rebuild = f"run `pip install .` in longrope's source folder again, or reinstall it ({file})"
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:  # a symbol that the torch it was built with had
        raise ImportError(
            f"{NAME}: the native extension does not fit torch {torch.__version__} "
            f"({error}): {rebuild}"
        ) from None
    try:
        built = module.build_info()
    except ValueError as error:  # of the instruction set, which the environment names
        raise ValueError(str(error).replace("isa:", "LONGROPE_ISA:", 1)) from None
    if built["torch"].split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"{NAME}: the native extension was built with torch {built['torch']}, and this is "
            f"torch {torch.__version__}: {rebuild}"
        )
    if file.parent != HERE:
        version = sys.modules[__package__].__version__
        differs = (
            ""
            if built["version"] == version
            else f" The versions differ: sources {version}, extension "
            f"{built['version']}; run `pip install .` again."
        )
        warnings.warn(
            f"longrope is imported from the source folder {HERE}, which has no native extension: "
            f"using the installed one, {file}.{differs}",
            RuntimeWarning,
            stacklevel=2,
        )
    sys.modules[NAME] = module
    return module


_C = sys.modules.get(NAME) or _load(_find())
