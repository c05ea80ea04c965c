#!/usr/bin/env bash
# Build the extension for a GPU machine that has no time to compile: on a machine without a GPU,
# against the headers of that machine's torch, for its Python and its one architecture.
#   bash .ci/gpu_prebuilt.sh FOLDER
# FOLDER gets _C.*.so (some megabytes) and prebuilt.txt, which says what it was built from and for;
# PREBUILT=FOLDER bash .ci/gpu_check.sh takes it from there. FOLDER/venv is kept for the next time.
# TORCH_VERSION (2.11.0), PYTHON (python3.12) and ARCH (9.0a) say what for. Needs nvcc of torch's
# CUDA major version, and 5 GB for torch's packages. Exit status: 0 built and imported, 77 skipped
# because there is no nvcc or no such Python, else failed.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?"gpu_prebuilt: expected a folder for the result"}
torch_version=${TORCH_VERSION:-2.11.0}
python=${PYTHON:-python3.12}
architecture=${ARCH:-9.0a}

for needed in "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" "$python"; do
  command -v "$needed" "$(basename "$needed")" > /dev/null || {
    echo "gpu_prebuilt: SKIPPED: no $(basename "$needed") on this machine"
    exit 77
  }
done
mkdir -p "$folder"
folder=$(realpath "$folder")
rm -f "$folder"/_C.*.so "$folder/prebuilt.txt"
[ -d "$folder/venv" ] || "$python" -m venv "$folder/venv"
# shellcheck disable=SC1091
source "$folder/venv/bin/activate"
# Without local wheel folders and settings of pip, which may hold a CPU build of the same version.
PIP_FIND_LINKS='' PIP_CONFIG_FILE=/dev/null python -m pip install --quiet \
  "torch==$torch_version" setuptools ninja numpy

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# What is tracked, and what will be: the build leaves nothing here.
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$scratch"
state=$(git rev-parse --short HEAD)$(git diff --quiet HEAD -- csrc setup.py build_backend || echo +)
(
  cd "$scratch"
  LONGROPE_CUDA=1 TORCH_CUDA_ARCH_LIST=$architecture python setup.py --quiet build_ext --inplace
  strip --strip-debug longrope/_C.*.so
  cp longrope/_C.*.so "$folder"
)

cd "$folder"
library=$(echo _C.*.so)
# As the GPU machine will: torch first, then the library by itself.
python - "$library" << 'END' | tee prebuilt.txt
import importlib.util
import sys

import torch

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
info = module.build_info()
assert info["cuda"], "the extension has no CUDA kernels"
at, q = torch.arange(3), torch.ones(1, 2, 3, 4)
torch.ops.longrope.rope(
    q, q, at, torch.ones(2, dtype=torch.float64), None, 0, None, 1.0, None, False, False
)
print(*(f"{name}: {value}" for name, value in info.items()), sep="\n")
END
{
  echo "commit: $state"
  echo "architecture: $architecture"
  echo "python: $(python -c 'import platform; print(platform.python_version())')"
  echo "size: $(du -k "$library" | cut -f1) KiB"
  echo "glibc at least: $(objdump -T "$library" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1)"
} | tee -a prebuilt.txt
[ "$(stat -c %s "$library")" -lt $((64 << 20)) ] || {
  echo "gpu_prebuilt: FAILED: expected less than 64 MiB"
  exit 1
}
