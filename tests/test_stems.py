"""The shape of the repository: one stem per op in every tree, torch only in csrc/bindings."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from longrope import ops

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CODE = ("*.h", "*.cpp", "*.cu", "*.cuh")

STEMS = sorted(
    p.name for p in CSRC.iterdir() if p.is_dir() and p.name not in ("bindings", "common")
)

#: The longest file that a newcomer reads in one go; most stay under 300 lines.
MOST_LINES = 400


def schemas() -> list[str]:
    """Names of all ops of the dispatcher, from the one file that defines them."""
    text = (CSRC / "bindings" / "schemas.cpp").read_text()
    return re.findall(r'm\.def\(\s*"(\w+)\(', text)


def public_functions(module) -> dict[str, inspect.Signature]:
    functions = {name: getattr(module, name) for name in module.__all__}
    return {n: inspect.signature(f) for n, f in functions.items() if inspect.isfunction(f)}


def test_the_stems():
    assert STEMS == ["attention", "perplexity", "rope"]


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_is_in_every_tree(stem):
    expected = [
        f"longrope/ops/{stem}.py",
        f"longrope/ops/reference/{stem}.py",
        f"csrc/{stem}/{stem}.h",
        f"csrc/bindings/{stem}.cpp",
        f"tests/ops/test_{stem}.py",
        f"tests/cpp/test_{stem}.cpp",
        f"benchmarks/bench_{stem}.py",
    ]
    assert [name for name in expected if not (ROOT / name).is_file()] == []
    assert list((CSRC / stem / "cpu").glob("*.cpp"))


@pytest.mark.parametrize("tree", ["longrope/ops", "longrope/ops/reference"])
def test_every_module_of_the_ops_is_a_stem(tree):
    found = sorted(p.stem for p in (ROOT / tree).glob("*.py") if not p.stem.startswith("_"))
    assert found == STEMS


@pytest.mark.parametrize("name", schemas())
def test_every_op_has_its_implementations(name):
    qualified = f"longrope::{name}"
    for key in ("CPU", "Meta"):  # a fake kernel registers as Meta
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key), key
    bound = [s for s in STEMS if f'("{name}", ' in (CSRC / f"bindings/{s}.cpp").read_text()]
    used = [
        s
        for s in STEMS
        if re.search(
            rf"torch\.ops\.longrope\.{name}\b", (ROOT / f"longrope/ops/{s}.py").read_text()
        )
    ]
    assert len(bound) == 1 and bound == used


def test_every_public_op_has_a_reference_with_its_signature():
    assert public_functions(ops)
    assert public_functions(ops) == public_functions(ops.reference)


def test_only_the_bindings_know_torch():
    torch_header = re.compile(r'#include [<"](torch|ATen|c10|caffe2|pybind11|Python\.h)')
    files = [f for pattern in CODE for f in CSRC.rglob(pattern) if f.parent.name != "bindings"]
    assert len(files) > 20
    assert [str(f) for f in files if torch_header.search(f.read_text())] == []


def test_no_source_is_left_out_of_the_build():
    """setup.py and CMakeLists.txt compile what lies in these folders."""
    compiled = {
        source
        for pattern in ("**/cpu/*.cpp", "bindings/*.cpp", "**/cuda/*.cu", "**/cuda/sm90/*.cu")
        for source in CSRC.glob(pattern)
    }
    assert {*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")} == compiled


def test_files_are_short():
    files = [f for pattern in CODE for f in CSRC.rglob(pattern)]
    files += (ROOT / "longrope").rglob("*.py")
    lengths = {str(f.relative_to(ROOT)): f.read_text().count("\n") for f in files}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}
