"""Builds longrope._C with torch.utils.cpp_extension. Folders decide what is compiled."""

from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
VERSION = "0.1.0"
sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))

setup(
    version=VERSION,
    ext_modules=[
        CppExtension(
            "longrope._C",
            sources,
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("LONGROPE_VERSION", f'"{VERSION}"')],
            extra_compile_args=["-O3", "-fopenmp", "-fvisibility=hidden"],
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
