"""What a test's own processes need to find: longrope and the tests' support."""

from __future__ import annotations

import os
from pathlib import Path

import longrope


def environment() -> dict[str, str]:
    """Return an environment in which `longrope` and `support` are those of the tests."""
    paths = [Path(longrope.__file__).parents[1], Path(__file__).parents[1]]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
