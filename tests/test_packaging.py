"""How longrope is built, installed and found; nothing here compiles or downloads."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools
import torch

import longrope
from longrope import _native

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = Path(longrope.__file__).resolve().parent
TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture(scope="session")
def backend():
    file = ROOT / "build_backend" / "longrope_build.py"
    spec = importlib.util.spec_from_file_location("longrope_build", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def only_setuptools(tmp_path):
    """A folder with nothing but setuptools, as in pip's isolated build environment."""
    folder = tmp_path / "isolated"
    folder.mkdir()
    installed = Path(setuptools.__file__).parents[1]
    version = f"setuptools-{setuptools.__version__}.dist-info"
    for name in ("setuptools", "_distutils_hack", version):
        (folder / name).symlink_to(installed / name)
    return folder


def python(*arguments, interpreter=sys.executable, cwd=ROOT, **environment):
    """Run Python without the environment's own ideas of what to build with."""
    ours = ("CXX", "LONGROPE_CUDA", "PYTHONPATH", "VIRTUAL_ENV")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [interpreter, *arguments],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def isolated(code, site, interpreter=sys.executable, **environment):
    """Run code with the backend where `site` is all that is installed (-S: no site-packages)."""
    paths = os.pathsep.join([str(site), str(ROOT / "build_backend")])
    code = f"import longrope_build as backend\n{code}"
    return python("-S", "-c", code, interpreter=interpreter, PYTHONPATH=paths, **environment)


# --- the torch to build against -------------------------------------------------------------------


def test_isolated_build_takes_the_installed_torch(only_setuptools):
    code = (
        "print(backend.get_requires_for_build_wheel())\n"
        "print(backend.get_requires_for_build_editable())\n"
        "import torch; print(torch.__version__, torch.__file__)"
    )
    answer = isolated(code, only_setuptools)
    assert answer.stdout.splitlines() == ["[]", "[]", f"{torch.__version__} {torch.__file__}"], (
        answer.stderr
    )


def test_isolated_build_keeps_what_is_its_own(only_setuptools):
    (only_setuptools / "typer.py").write_text("here = True")
    code = (
        "import sys; paths = list(sys.path); backend.find_torch()\n"
        "import typer; print(typer.here, sys.path == paths)"
    )
    answer = isolated(code, only_setuptools)
    assert answer.stdout == "True True\n", answer.stderr


def test_isolated_build_asks_for_torch_where_there_is_none(only_setuptools, tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    bare = tmp_path / "empty" / "bin" / "python"
    code = "print(backend.get_requires_for_build_wheel())"
    assert isolated(code, only_setuptools, bare).stdout == "['torch>=2.11,<2.14']\n"
    # Front ends that build in an environment of their own (build, uv) leave the active one's name.
    if sys.prefix != sys.base_prefix:
        active = isolated(code, only_setuptools, bare, VIRTUAL_ENV=sys.prefix)
        assert active.stdout == "[]\n"


def test_torch_out_of_range_is_refused(backend):
    for version in ("2.11.0", "2.12.1+cu130", "2.13.0+cpu"):
        backend.check_torch(version)
    for version in ("2.10.2", "2.14.0", "3.0.0"):
        with pytest.raises(SystemExit, match=rf"expected torch>=2.11,<2.14, .* torch {version}"):
            backend.check_torch(version)


def test_metadata_pins_the_minor_of_torch(tmp_path):
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("build_backend", "longrope"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    code = (
        "import sys; sys.path.insert(0, 'build_backend')\n"
        "import longrope_build; print(longrope_build.prepare_metadata_for_build_wheel('.'))"
    )
    answer = python("-c", code, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    metadata = (tmp_path / answer.stdout.splitlines()[-1] / "METADATA").read_text()
    assert f"\nVersion: {longrope.__version__}\n" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch")]
    assert required == [f"Requires-Dist: torch=={TORCH_MINOR}.*"]


# --- refusals in one sentence ---------------------------------------------------------------------


def test_compiler_is_found(backend, monkeypatch):
    monkeypatch.setenv("CXX", f"ccache {sys.executable} -flag")
    assert backend.compiler() == [sys.executable, "-flag"]
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(SystemExit, match=r"needs a C\+\+ compiler and CXX=/nowhere/g\+\+ is no "):
        backend.compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="none was found on PATH: install one"):
        backend.check_compiler()


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("yes", "longrope: LONGROPE_CUDA: expected 0, 1 or auto, got 'yes'"),
        ("1", f"longrope: LONGROPE_CUDA=1 was asked for and torch {torch.__version__} was built "
              "without CUDA: install a CUDA build of it"),
    ],
)  # fmt: skip
def test_impossible_choice_of_cuda_is_refused(choice, sentence):
    if choice == "1" and torch.version.cuda:
        pytest.skip("this torch has CUDA")
    answer = python("setup.py", "--version", LONGROPE_CUDA=choice)
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1] == sentence
    assert "Traceback" not in answer.stderr


# --- the extension --------------------------------------------------------------------------------


def test_build_info():
    info = longrope._C.build_info()
    assert info["version"] == longrope.__version__
    assert info["torch"].startswith(TORCH_MINOR + ".")
    assert info["isa"] in longrope._C.isas()


def test_one_openmp_runtime():
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("Linux only")
    names = {line.split()[-1] for line in maps.read_text().splitlines()}
    runtimes = {n for n in names if any(w in Path(n).name for w in ("libgomp", "libomp", "iomp"))}
    assert len(runtimes) == 1


@pytest.fixture
def clone(tmp_path):
    """The source folder as a fresh clone has it, without an extension."""
    shutil.copytree(
        ROOT / "longrope",
        tmp_path / "longrope",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "model"),
    )
    return tmp_path


def test_clone_uses_the_installed_extension_and_says_so(clone):
    version = longrope.__version__
    init = clone / "longrope" / "__init__.py"
    init.write_text(init.read_text().replace(f'__version__ = "{version}"', '__version__ = "9.9"'))
    code = "import longrope; from longrope import ops; print(longrope.__file__, longrope._C.isa())"
    answer = python("-c", code, cwd=clone, PYTHONPATH=str(INSTALLED.parent))
    assert answer.stdout.startswith(str(init)), answer.stderr
    assert answer.stderr.count("RuntimeWarning: longrope is imported from the source folder") == 1
    assert str(INSTALLED / "_C") in answer.stderr
    assert f"The versions differ: sources 9.9, extension {version}" in answer.stderr


def test_missing_extension_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "HERE", tmp_path / "longrope")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ImportError, match="is not built: run `pip install .` in " + str(tmp_path)):
        _native._find()


def test_extension_of_another_torch_is_refused():
    code = "import torch; torch.__version__ = '2.99.0'; import longrope; longrope._C"
    answer = python("-c", code, cwd=INSTALLED.parent)
    assert answer.returncode == 1
    assert (
        f"built with torch {torch.__version__.split('+')[0]}, and this is torch 2.99.0"
        in (answer.stderr.splitlines()[-1])
    )


# --- what is packed -------------------------------------------------------------------------------


def test_every_data_file_is_packed():
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["longrope"]
    folder = ROOT / "longrope"
    data = [
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc", ".so")
    ]
    assert "data/published_factors.json" in data
    assert [f for f in data if not any(fnmatch.fnmatch(f, p) for p in patterns)] == []
    packed = [str(f.relative_to(INSTALLED)) for f in INSTALLED.rglob("*") if f.is_file()]
    assert set(data) <= set(packed)
    assert [f for f in packed if Path(f).suffix in (".cpp", ".h", ".cu", ".cuh")] == []


def test_the_readme_and_ci_run_the_same_test_command():
    command = 'pip install ".[test]" && pytest'
    assert command in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == command
