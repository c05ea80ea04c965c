"""The `longrope` command as tests call it."""

from __future__ import annotations

import numpy as np
from typer.testing import CliRunner

from longrope.cli.main import app


def call(*arguments, code=0):
    """Run a command in this process, which must end with `code`; returns what it printed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def write_letters(path, count=600):
    """Write a text of random letters; returns the path."""
    path.write_bytes(np.random.default_rng(0).integers(97, 123, count, dtype=np.uint8).tobytes())
    return path
