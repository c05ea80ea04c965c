"""ops.reference without the compiled extension: a specification that runs anywhere."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib.machinery
import torch

importlib.machinery.EXTENSION_SUFFIXES.clear()  # so that longrope._C is nowhere to be found
import longrope.ops.reference as reference
from longrope.ops import Rotation

q = torch.randn(1, 2, 3, 4)
positions, inv_freq = torch.arange(3), torch.tensor([1.0, 0.1]).double()
turned = reference.rope(q, q, positions, inv_freq)
inside = reference.attention(q, q, q, rotation=Rotation(inv_freq, positions, positions))
assert torch.equal(inside, reference.attention(*turned, q))
assert reference.linear_nll(q[0, 0], q[0, 1], positions).isfinite().all()
assert not hasattr(torch.ops.longrope, "rope")
try:
    from longrope.ops import rope
except ImportError as error:
    print(error)
"""


def test_the_reference_needs_no_compiled_extension():
    """It computes, and a kernel asked for says in one sentence how to build it."""
    answer = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("longrope._C: the native extension is not built: run `pip")
    assert answer.stdout.count("\n") == 1
