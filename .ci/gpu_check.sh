#!/usr/bin/env bash
# One command on a machine with an NVIDIA GPU: build against its torch, run the tests on CUDA, run
# compute-sanitizer on a short set, and all benchmarks, whose rows go to
# benchmarks/results/<gpu>.csv.
#   bash .ci/gpu_check.sh [--quick] [--logs FOLDER] [build|tests|sanitizer|benchmarks ...]
# Without a list, all four. It builds in place and installs nothing. A step that fails does not stop the next ones; the last lines say what
# passed. Needs torch with CUDA, transformers, nvcc, ninja, pytest and hypothesis, and no network:
# what is missing is named before anything runs.
set -uo pipefail
cd "$(dirname "$0")/.."

quick=()
logs=build/gpu_check
steps=()
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=(--quick) ;;
    --logs) logs=${2:?gpu_check: --logs needs a folder}; shift ;;
    build | tests | sanitizer | benchmarks) steps+=("$1") ;;
    *) echo "gpu_check: expected --quick, --logs FOLDER, build, tests, sanitizer or benchmarks," \
         "got $1" >&2; exit 2 ;;
  esac
  shift
done
[ ${#steps[@]} -gt 0 ] || steps=(build tests sanitizer benchmarks)
mkdir -p "$logs" || exit 2
logs=$(realpath "$logs")
python=$(command -v python3 || command -v python) || { echo "gpu_check: no python3" >&2; exit 2; }

echo "== what is here"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader ||
  echo "(nvidia-smi does not answer)"
"$python" - << 'END' || exit 2
import importlib.util, os, sys

def stop(sentence):
    sys.exit(f"gpu_check: {sentence}")

needed = ["torch", "transformers", "numpy", "safetensors", "setuptools", "ninja", "pytest",
          "hypothesis", "typer", "rich", "matplotlib"]
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    stop(f"missing packages: run `{sys.executable} -m pip install {' '.join(missing)}` first")
import torch

print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
if torch.version.cuda is None:
    stop(f"torch {torch.__version__} was built without CUDA: install a CUDA build of it")
if not torch.cuda.is_available():
    stop("torch sees no GPU")
from torch.utils.cpp_extension import CUDA_HOME as home
if not home or not os.path.exists(f"{home}/bin/nvcc"):
    stop("no nvcc: install the CUDA toolkit or set CUDA_HOME")
major, minor = torch.cuda.get_device_capability()
print(torch.cuda.get_device_name(), f"sm_{major}{minor}", "nvcc of", home)
if major < 8:
    stop(f"the kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}")
END

capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
passed=()
failed=()

# step NAME SECONDS COMMAND...: runs it with a log of its own and counts the result.
step() {
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  if timeout "$limit" "$@" 2>&1 | tee "$logs/${name// /-}.log" | tail -n 25; then
    passed+=("$name")
  else
    failed+=("$name")
    echo "(failed: $logs/${name// /-}.log)"
  fi
}

# Tests whose names say that they run a kernel forward and backward.
short="cuda and (accuracy or gradients or merged or population)"
sanitize() {
  # Without torch's caching allocator, so that an access past a tensor leaves its allocation.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "compute-sanitizer $1" 1200 \
    compute-sanitizer --tool "$1" --target-processes all --error-exitcode 99 \
    "$python" -m pytest -q -x -p no:cacheprovider tests/ops -k "$short"
}

for wanted in "${steps[@]}"; do
  case $wanted in
    build)
      LONGROPE_CUDA=1 step "build" 1800 "$python" setup.py build_ext --inplace
      step "build info" 120 "$python" -c "
import longrope; info = longrope._C.build_info(); print(info); assert info['cuda']"
      ;;
    tests)
      step "tests of the ops on the GPU" 1200 "$python" -m pytest -q tests/ops -k cuda
      step "tests of models on the GPU" 1200 "$python" -m pytest -q tests/test_devices.py
      ;;
    sanitizer)
      if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck synccheck; do sanitize "$tool"; done
      else
        failed+=("compute-sanitizer (not found on the PATH)")
      fi
      ;;
    benchmarks)
      for script in benchmarks/bench_*.py; do
        step "$(basename "$script" .py)" 1200 "$python" "$script" --device cuda --save "${quick[@]}"
      done
      ;;
  esac
done

echo "== summary ($logs)"
printf 'passed: %s\n' "${passed[@]:-none}"
[ ${#failed[@]} -eq 0 ] || { printf 'FAILED: %s\n' "${failed[@]}"; exit 1; }
