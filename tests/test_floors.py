"""The floors of the package: no module imports from a floor above its own."""

import ast
from pathlib import Path

import pytest

import longrope

PACKAGE = Path(longrope.__file__).parent
#: From the top down. `longrope` itself, the public names, is for users: the command line and the
#: demo alone import it.
FLOORS = (
    ("cli", "__main__"),
    ("demo", "__init__"),
    ("model",),
    ("extension",),
    ("factor_search",),
    ("evaluation",),
    ("checkpoints",),
    ("patching",),
    ("report",),
    ("documents",),
    ("runs",),
    ("distributed",),
    ("factors",),
    ("ops",),
    ("_native",),
    ("_validation", "_files", "_numbers", "_warnings"),
    ("errors",),
)
LEVEL = {name: level for level, names in enumerate(reversed(FLOORS)) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(source):
    """Yield `(line, room)` of every import from the package, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            # `from longrope import x`: x is a room, or else a public name.
            names = (
                [
                    f"longrope.{alias.name}" if alias.name in LEVEL else "longrope"
                    for alias in node.names
                ]
                if node.module == "longrope"
                else [node.module]
            )
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "longrope":
                yield node.lineno, rest[0] if rest else "__init__"


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def climbs(room, source):
    """Return the imports of a module in `room` that lead up."""
    return [(line, to) for line, to in imports_of(source) if LEVEL[to] > LEVEL[room]]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_from_a_floor_above(path):
    room = room_of(path)
    assert room in LEVEL, f"{room}: give it a floor"
    assert climbs(room, path.read_text(encoding="utf-8")) == []


def test_climbing_is_seen_wherever_it_stands():
    assert climbs("factors", "def f():\n    from longrope.patching import apply") == [
        (2, "patching")
    ]
    assert climbs("ops", "import longrope") == [(1, "__init__")]
    assert climbs("patching", "from longrope import ops, perplexity") == [(1, "__init__")]
    assert climbs("runs", "if TYPE_CHECKING:\n    import longrope.evaluation.nll as nll") == [
        (2, "evaluation")
    ]
    assert climbs("cli", "import longrope\nfrom longrope import search") == []
    assert climbs("patching", "import torch\nfrom longrope.patching.rotation import x") == []
