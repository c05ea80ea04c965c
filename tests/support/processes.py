"""What a test's own processes need to find: longrope and the tests' support."""

from __future__ import annotations

import os
from pathlib import Path

import longrope


def environment() -> dict[str, str]:
    """Return an environment in which `import longrope` and `import support` give what tests have."""
    paths = [Path(longrope.__file__).parents[1], Path(__file__).parents[1]]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
