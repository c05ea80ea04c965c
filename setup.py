"""Builds longrope._C with torch.utils.cpp_extension. Folders decide what is compiled.

LONGROPE_CUDA=auto (default) compiles the CUDA kernels where torch was built for CUDA and nvcc is
found, whether this machine has a GPU or not; 1 insists on them, 0 leaves them out.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import longrope_build as backend  # noqa: E402
import longrope_cuda as cuda  # noqa: E402

#: Run-time requirements beside torch, whose minor is the one that the extension was built with.
DEPENDENCIES = [
    "transformers>=4.57,<6",
    "numpy",
    "safetensors",
    "typer",
    "rich",
    "matplotlib",
    "jinja2",
    "tomli>=2; python_version < '3.11'",  # the standard library's tomllib, before it was there
]

torch_version = backend.find_torch()
if torch_version:
    torch_requirement = "torch=={}.{}.*".format(*backend.minor(torch_version))
else:
    torch_requirement = backend.TORCH  # a source distribution can be made without torch


def sources(*patterns: str) -> list[str]:
    """The files that match, relative to the root, sorted. CMakeLists.txt globs the same."""
    found = {str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)}
    return sorted(found)


CPP_SOURCES = sources("csrc/**/cpu/*.cpp", "csrc/bindings/*.cpp")
CUDA_SOURCES = sources("csrc/**/cuda/*.cu")


def openmp_flags() -> list[str]:
    """Return the flags that make `at::parallel_for` parallel, empty where that is impossible.

    They go to the compiler and not to the linker: the OpenMP calls are then bound to the runtime
    that torch has loaded, and never bring a second one with a thread pool of its own. A probe shows
    whether this compiler's calls are found there (g++ and libgomp: yes; Apple's clang has no
    OpenMP; clang on Linux calls another runtime than the libgomp in torch's own packages).
    """
    import torch

    if not torch.backends.openmp.is_available():
        return []
    with tempfile.TemporaryDirectory() as folder:
        source, object_file, library = (Path(folder, f"probe.{end}") for end in ("cpp", "o", "so"))
        source.write_text(
            "#include <omp.h>\n"
            "int probe() { int n = 0;\n"
            "#pragma omp parallel reduction(+ : n)\n"
            "  n += omp_get_num_threads();\n"
            "  return n; }\n"
        )
        compile_probe = ["-fopenmp", "-fPIC", "-O1", "-c", source, "-o", object_file]
        link_probe = ["-shared", object_file, "-o", library]
        try:
            for arguments in (compile_probe, link_probe):
                command = [*backend.compiler(), *arguments]
                subprocess.run(command, check=True, capture_output=True)
            ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError):
            print(
                "longrope: building without OpenMP, so CPU kernels run on one thread: this "
                "compiler has none that torch's runtime serves (g++ has)",
                file=sys.stderr,
            )
            return []
    return ["-fopenmp"]


def extension() -> Extension:
    """Describe longrope._C; without torch, an empty shell, enough for metadata and sdist."""
    if torch_version is None:
        return Extension("longrope._C", [])
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    common = {"name": "longrope._C", "include_dirs": [str(ROOT / "csrc")]}
    # -g0: Python's own flags contain -g, which makes the library ten times larger here.
    cxx = ["-O3", "-g0", "-fvisibility=hidden"]
    if not cuda.compiles_kernels():
        return CppExtension(sources=CPP_SOURCES, extra_compile_args={"cxx": cxx}, **common)
    # Behind the toolkit's headers, which it must not replace in part, those that torch's own CUDA
    # packages bring (nvidia/cu13/include): torch includes some that a small toolkit lacks.
    bundled = Path(torch.__file__).parents[1] / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}"
    cxx += ["-idirafter", str(bundled / "include")]
    return CUDAExtension(
        sources=CPP_SOURCES + CUDA_SOURCES,
        define_macros=[("LONGROPE_CUDA", f'"{torch.version.cuda}"')],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden"]},
        **common,
    )


class NoTorch(build_ext):
    """Says what is missing when something must be compiled and there is no torch."""

    def run(self):
        raise SystemExit(
            "longrope: building it needs torch, and there is none: run pip install "
            f'"{backend.TORCH}" first, or let pip fetch it by leaving out --no-build-isolation'
        )


def torch_build_ext():
    """Return torch's build_ext with our checks before it and one sentence behind it."""
    from setuptools.errors import BaseError
    from torch.utils.cpp_extension import BuildExtension

    class BuildWithTorch(BuildExtension):
        untried = backend.untried(torch_version)

        def finalize_options(self):
            super().finalize_options()
            # Objects compiled against another torch must not be taken for up to date.
            self.build_temp = os.path.join(self.build_temp, f"torch-{torch_version}")

        def run(self):
            backend.check_torch(torch_version)
            if self.untried:
                print(f"longrope: {self.untried}; building against it", file=sys.stderr)
            backend.check_compiler()
            # Compiling (torch) and linking (setuptools) look for a compiler in different ways,
            # and torch takes CXX for the name of a program.
            os.environ["CXX"], *self.compiler_flags = backend.compiler()
            if any(set(CUDA_SOURCES) & set(ext.sources) for ext in self.extensions):
                cuda.choose_architectures()
            super().run()

        def build_extensions(self):
            version = self.distribution.get_version()
            for ext in self.extensions:
                ext.define_macros.append(("LONGROPE_VERSION", f'"{version}"'))
                ext.extra_compile_args["cxx"] += self.compiler_flags + openmp_flags()
                ext.extra_link_args += self.compiler_flags
            try:
                for ext in self.extensions:
                    if set(CUDA_SOURCES) & set(ext.sources) and cuda.builds_sm90():
                        objects = cuda.compile_sm90(ROOT, Path(self.build_temp, "sm90").resolve())
                        ext.extra_objects += objects
                        ext.extra_compile_args["nvcc"].append("-DLONGROPE_SM90")
                super().build_extensions()
            except (RuntimeError, BaseError, subprocess.CalledProcessError) as error:
                # torch wraps a failed compilation in a long traceback that hides the first error.
                hint = f"; {self.untried}" if self.untried else ""
                raise SystemExit(
                    "longrope: compiling failed; the compiler's first error above says where "
                    f"({str(error).splitlines()[0]}){hint}"
                ) from None

    return BuildWithTorch


setup(
    install_requires=[torch_requirement, *DEPENDENCIES],
    ext_modules=[extension()],
    cmdclass={"build_ext": torch_build_ext() if torch_version else NoTorch},
)
