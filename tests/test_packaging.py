"""How longrope is built, installed and found; nothing here compiles or downloads."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from email import message_from_string
from pathlib import Path

import pytest
import setuptools
import torch
import torch.utils.cpp_extension

import longrope
from longrope import _native

ROOT = Path(__file__).resolve().parents[1]
#: The package that was installed: where the extension lies. (Under `python -m pytest` the Python
#: files are those of the source folder, which comes first on the path.)
INSTALLED = Path(longrope._C.__file__).resolve().parent
TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])


def build_module(name):
    file = ROOT / "build_backend" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def backend():
    return build_module("longrope_build")


@pytest.fixture(scope="session")
def cuda_build():
    return build_module("longrope_cuda")


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
    assert isolated(code, only_setuptools, bare).stdout == "['torch>=2.11']\n"
    # Front ends that build in an environment of their own (build, uv) leave the active one's name.
    if sys.prefix != sys.base_prefix:
        active = isolated(code, only_setuptools, bare, VIRTUAL_ENV=sys.prefix)
        assert active.stdout == "[]\n"


def test_only_a_torch_that_is_too_old_is_refused(backend):
    for version in ("2.11.0", "2.12.1+cu130", "2.16.0.dev20261101", "3.0.0a0+git1234"):
        backend.check_torch(version)
    for version in ("2.10.2", "1.13.1+cpu"):
        with pytest.raises(
            SystemExit, match=rf"expected torch>=2.11, .* torch {re.escape(version)}"
        ):
            backend.check_torch(version)


def test_a_torch_newer_than_those_tried_is_named_in_one_line(backend):
    newest = ".".join(map(str, backend.TORCH_NEWEST_TRIED))
    assert backend.untried("2.11.0") == backend.untried(f"{newest}.9+cu130") == ""
    sentence = "torch 3.0.0 is newer than the newest that was tried, " + newest
    assert backend.untried("3.0.0") == sentence
    # The newest of the table that says what was tried.
    rows = re.findall(r"^\| (\d+\.\d+)\.\d+", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert max(rows, key=backend.minor) == newest


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A copy of the sources without csrc, its METADATA and the names in its source distribution."""
    folder = tmp_path_factory.mktemp("sources")
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    for name in ("build_backend", "docs", "longrope"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so"))
    code = (
        "import sys; sys.path.insert(0, 'build_backend'); import longrope_build as backend\n"
        "metadata = backend.prepare_metadata_for_build_wheel('.')\n"
        "sdist = backend.build_sdist('.'); print(); print(metadata); print(sdist)"
    )
    answer = python("-c", code, cwd=folder)
    assert answer.returncode == 0, answer.stderr
    metadata, sdist = answer.stdout.splitlines()[-2:]
    with tarfile.open(folder / sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    return message_from_string((folder / metadata / "METADATA").read_text()), names


def test_metadata_pins_the_minor_of_torch(packed):
    metadata, _ = packed
    assert metadata["Version"] == longrope.__version__
    required = [line for line in metadata.get_all("Requires-Dist") if line.startswith("torch")]
    assert required == [f"torch=={TORCH_MINOR}.*"]


def test_an_index_page_has_what_a_reader_looks_for(packed):
    metadata, _ = packed
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert "https://arxiv.org/abs/2402.13753" in " ".join(metadata.get_all("Project-URL"))
    least = tuple(map(int, metadata["Requires-Python"].removeprefix(">=").split(".")))
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(metadata.get_all("Classifier")))
    assert min(tuple(map(int, v.split("."))) for v in versions) == least


def test_the_source_distribution_has_documents_and_type_marker(packed):
    _, names = packed
    documents = [f"docs/{file.name}" for file in (ROOT / "docs").iterdir()]
    assert {*documents, "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "longrope/py.typed"} <= {
        *names
    }


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


# --- CUDA -----------------------------------------------------------------------------------------


@pytest.fixture
def toolkit(cuda_build, monkeypatch, tmp_path):
    """A folder with an nvcc that knows some architectures, on a machine without a GPU."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-code ] && echo 'sm_75 sm_80 sm_90 sm_103'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cuda_build, "find_toolkit", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    return nvcc


def test_architectures_without_a_gpu_are_those_that_nvcc_knows(cuda_build, toolkit, capsys):
    cuda_build.choose_architectures()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "compiled for 8.0, 9.0 and newer" in said
    # What torch makes of it, which fails with an IndexError without a list and a GPU.
    flags = torch.utils.cpp_extension._get_cuda_arch_flags()
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_90,code=sm_90",
    ]


@pytest.mark.parametrize("gpus", [0, 1])
def test_architectures_that_are_named_or_seen_are_left_alone(
    cuda_build, toolkit, monkeypatch, gpus
):
    named = "" if gpus else "7.5"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    cuda_build.choose_architectures()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == named


def test_an_nvcc_that_knows_no_architecture_of_ours_is_refused(cuda_build, toolkit):
    toolkit.write_text("#!/bin/sh\necho sm_200\n")
    with pytest.raises(SystemExit, match=r"knows none of .* set TORCH_CUDA_ARCH_LIST$"):
        cuda_build.choose_architectures()


@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        ("9.0", True), ("8.0;9.0+PTX", True), ("8.0 9.0a", True), ("Hopper", True),
        ("8.0;8.6", False), ("10.0+PTX", False), ("", False),
    ],
)  # fmt: skip
def test_kernels_of_9_0_are_built_where_it_is_named(
    cuda_build, toolkit, monkeypatch, named, wanted
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    assert cuda_build.builds_sm90() is wanted


@pytest.mark.parametrize(("capability", "wanted"), [((9, 0), True), ((8, 6), False)])
def test_kernels_of_9_0_are_built_where_such_a_gpu_is_seen(
    cuda_build, toolkit, monkeypatch, capability, wanted
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cuda_build.builds_sm90() is wanted


def test_kernels_of_9_0_are_compiled_for_it_alone_and_where_something_changed(
    cuda_build, toolkit, tmp_path, monkeypatch
):
    """The nvcc is a script that writes down what it is asked and makes an empty file."""
    monkeypatch.delenv("CC", raising=False)
    toolkit.write_text(
        '#!/bin/sh\necho "$@" >> "$0.log"\nwhile [ "$1" != -o ]; do shift; done\n> "$2"\n'
    )
    source = tmp_path / "csrc" / "attention" / "cuda" / "sm90" / "forward.cu"
    source.parent.mkdir(parents=True)
    source.touch()
    for time in (0, 0, 2**40, 2**40):  # of the source: long ago, and in days to come
        os.utime(source, (time, time))
        objects = cuda_build.compile_sm90(tmp_path, tmp_path / "objects")
    assert [Path(o).name for o in objects] == ["attention-forward.o"] and Path(objects[0]).exists()
    asked = (tmp_path / "bin" / "nvcc.log").read_text().splitlines()
    assert len(asked) == 3
    for command in asked:
        assert re.findall(r"-gencode=\S+", command) == ["-gencode=arch=compute_90a,code=sm_90a"]
        assert "-ccbin" not in command

    os.utime(source, (0, 0))
    cuda_build.compile_sm90(tmp_path, tmp_path / "objects")
    monkeypatch.setattr(cuda_build, "SM90_FLAGS", (*cuda_build.SM90_FLAGS, "-lineinfo"))
    for _ in range(2):
        cuda_build.compile_sm90(tmp_path, tmp_path / "objects")
    asked = (tmp_path / "bin" / "nvcc.log").read_text().splitlines()
    assert ["-lineinfo" in command for command in asked] == [False, False, False, True]


def test_kernels_of_9_0_have_the_host_compiler_of_the_others(
    cuda_build, toolkit, tmp_path, monkeypatch
):
    """`$CC`, which torch gives to nvcc for all sources that it compiles."""
    toolkit.write_text('#!/bin/sh\necho "$@" >> "$0.log"\n')
    source = tmp_path / "csrc" / "attention" / "cuda" / "sm90" / "forward.cu"
    source.parent.mkdir(parents=True)
    source.touch()
    monkeypatch.setenv("CC", "gcc-12")
    cuda_build.compile_sm90(tmp_path, tmp_path / "objects")
    assert " -ccbin gcc-12 " in (tmp_path / "bin" / "nvcc.log").read_text()


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


# --- names ----------------------------------------------------------------------------------------


def imported_names(statements):
    """Return `{name: "module"}` of `from module import name` statements."""
    return {
        alias.name: statement.module
        for statement in statements
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_type_checkers_see_the_names_that_are_imported_on_first_use():
    tree = ast.parse((ROOT / "longrope" / "__init__.py").read_text())
    (block,) = [
        statement
        for statement in tree.body
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
    ]
    modules = dict.fromkeys(longrope._MODULES, "longrope")
    assert imported_names(block.body) == {**longrope._HOMES, **modules}
    assert {*longrope.__all__} == {*longrope._HOMES, "__version__"} - {"_C"}


def test_public_names_and_modules_need_no_import_of_their_own():
    code = (
        "import sys, longrope\n"
        "assert not {'numpy', 'torch'} & {*sys.modules}\n"
        "assert {*longrope.__all__, *longrope._MODULES} <= {*dir(longrope)}\n"
        "longrope.ops.rope, longrope.factors.published, longrope.errors\n"
        "assert 'transformers' not in sys.modules\n"
        "names = [n for n in longrope.__all__ if n not in ('__version__', 'RULER_TASKS')]\n"
        "print(*(getattr(longrope, name).__name__ for name in names), longrope.RULER_TASKS[0])"
    )
    answer = python("-c", code, cwd=INSTALLED.parent)
    # A tuple has no name of its own.
    names = [name for name in longrope.__all__ if name not in ("__version__", "RULER_TASKS")]
    assert answer.stdout.split() == [*names, "niah_single_1"], answer.stderr
    with pytest.raises(AttributeError, match="module 'longrope' has no attribute 'nonsense'"):
        longrope.nonsense  # noqa: B018


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
