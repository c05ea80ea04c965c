"""Warnings that name the line of the user's code that led to them."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).parent) + os.sep


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as from the line that has called into this package, however deep inside we are.

    So Python's own rule, once for each text and line, means once for each cause and line of the
    user. (`skip_file_prefixes` of `warnings.warn` needs Python 3.12, and would stop at decorators
    of torch between two of our functions.)
    """
    warnings.warn(message, category, stacklevel=_level(sys._getframe(1)))


def _level(frame: FrameType | None) -> int:
    """Return the `stacklevel` of what has called the outermost function of this package."""
    level = depth = 1  # of `warn` itself
    while frame is not None:
        depth += 1
        if frame.f_code.co_filename.startswith(_PACKAGE):
            level = depth
        frame = frame.f_back
    return level + 1
