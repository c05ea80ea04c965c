"""Whether the CUDA kernels are compiled, by which toolkit, and for which architectures.

`setup.py` asks, where torch is importable; pip's hooks do not need this module.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

#: Compute capabilities that an extension is compiled for where no GPU is at hand to ask, as far as
#: nvcc knows them: A100, RTX 30, L40 and RTX 40, H100 and H200, B200, RTX 50. PTX of the last one
#: serves what comes after them. (torch would take those of the GPUs that it sees, and fails with an
#: IndexError where it sees none: in an image build, on the login node of a cluster.)
CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

#: What the sources in folders `cuda/sm90` are compiled for.
SM90_FLAGS = ("-gencode=arch=compute_90a,code=sm_90a",)


def compiles_kernels() -> bool:
    """Decide whether to compile the CUDA kernels; refuse where that is asked for and impossible."""
    import torch

    choice = os.environ.get("LONGROPE_CUDA", "auto").strip().lower() or "auto"
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"longrope: LONGROPE_CUDA: expected 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return False
    home = find_toolkit()
    nvcc = Path(home, "bin", "nvcc") if home else None
    obstacle = None
    if torch.version.cuda is None:
        obstacle = f"torch {torch.__version__} was built without CUDA: install a CUDA build of it"
    elif not (nvcc and nvcc.exists()):
        obstacle = "nvcc was not found: set CUDA_HOME to the folder of the CUDA toolkit"
    else:
        release = ask(nvcc, "--version").partition("release ")[2].partition(",")[0]
        if release.split(".")[0] != torch.version.cuda.split(".")[0]:
            obstacle = (
                f"{nvcc} is of CUDA {release or 'unknown'} and torch {torch.__version__} of CUDA "
                f"{torch.version.cuda}: point CUDA_HOME to a toolkit of the same major version"
            )
    if choice == "1" and obstacle:
        raise SystemExit(f"longrope: LONGROPE_CUDA=1 was asked for and {obstacle}")
    if obstacle and torch.version.cuda:
        print(f"longrope: building for the CPU only, as {obstacle}", file=sys.stderr)
    return obstacle is None


def find_toolkit() -> str | None:
    """Return the folder of the CUDA toolkit, and tell torch's build of it where it looked wrong.

    torch takes the parent of the folder in which nvcc is found, which may hold no more than a
    script that calls the nvcc of a toolkit: nvcc itself knows.
    """
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    if not home or Path(home, "include", "cuda_runtime.h").exists():
        return home
    answer = ask(Path(home, "bin", "nvcc"), "--dryrun", "-x", "cu", os.devnull)
    if top := re.search(r"^#\$ TOP=(.+)$", answer, re.MULTILINE):
        home = os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(Path(top[1]).resolve())
    return home


def choose_architectures() -> None:
    """Set TORCH_CUDA_ARCH_LIST to `CAPABILITIES` where neither it nor a GPU says what to do."""
    import torch

    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "native") not in ("", "native")
    if named or torch.cuda.device_count():
        return
    nvcc = Path(find_toolkit(), "bin", "nvcc")
    known = set(re.findall(r"sm_(\d+)\b", ask(nvcc, "--list-gpu-code")))
    chosen = [c for c in CAPABILITIES if c.replace(".", "") in known]
    if not chosen:
        raise SystemExit(
            f"longrope: {nvcc} knows none of the architectures {', '.join(CAPABILITIES)} and this "
            "machine has no GPU to ask: set TORCH_CUDA_ARCH_LIST"
        )
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(chosen) + "+PTX"
    print(
        f"longrope: no GPU here, so the CUDA kernels are compiled for {', '.join(chosen)} and "
        "newer (TORCH_CUDA_ARCH_LIST chooses others)",
        file=sys.stderr,
    )


def builds_sm90() -> bool:
    """Tell whether the build is for compute capability 9.0 among others.

    By TORCH_CUDA_ARCH_LIST, or where that is not set by the GPUs of this machine.
    """
    import torch

    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if named in ("", "native"):
        devices = range(torch.cuda.device_count())
        return any(torch.cuda.get_device_capability(i) == (9, 0) for i in devices)
    return bool({"9.0", "9.0a", "Hopper"} & set(re.split(r"[\s;]+", named.replace("+PTX", ""))))


def compile_sm90(root: Path, folder: Path) -> list[str]:
    """Compile csrc/*/cuda/sm90/*.cu, unless they are up to date; the object files in `folder`.

    Beside each lies the command that made it: another one makes it again.

    For sm_90a alone, as no other architecture has their instructions: torch compiles all sources of
    an extension for the same list. They know nothing of torch.
    """
    nvcc = Path(find_toolkit(), "bin", "nvcc")
    # As torch does for the other sources: the default compiler may be too new for nvcc.
    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
    changed = max(p.stat().st_mtime for p in (root / "csrc").rglob("*.*"))
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sorted((root / "csrc").glob("*/cuda/sm90/*.cu")):
        target = folder / f"{source.parents[2].name}-{source.stem}.o"
        objects.append(str(target))
        command = [
            nvcc, "-std=c++17", "-O3", f"-I{root / 'csrc'}", *SM90_FLAGS, *host,
            "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c", source, "-o", target,
        ]  # fmt: skip
        made_by, line = target.with_suffix(".command"), shlex.join(map(str, command))
        current = target.exists() and target.stat().st_mtime > changed
        if current and made_by.exists() and made_by.read_text() == line:
            continue
        made_by.unlink(missing_ok=True)
        subprocess.run(command, check=True)
        made_by.write_text(line)
    return objects


def ask(nvcc: Path, *arguments: str) -> str:
    """Return what nvcc prints, on either stream; nothing where it cannot be run."""
    try:
        answer = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return answer.stdout + answer.stderr
