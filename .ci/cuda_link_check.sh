#!/usr/bin/env bash
# Build the whole CUDA extension against a CUDA build of torch on a machine without a GPU, import
# it, run the CPU tests against it, and see that CUDA tensors are refused in one clear sentence.
#   bash .ci/cuda_link_check.sh [FOLDER]
# FOLDER (default: a temporary one, removed at the end) keeps the virtual environment for the next
# run; TESTS="tests/ops" runs some of the tests in place of all. Needs nvcc, and about 5 GB for
# torch's CUDA packages. Exit status: 0 passed, 77 skipped because there is no nvcc, else failed.
set -euo pipefail
cd "$(dirname "$0")/.."
torch_version=${TORCH_VERSION:-2.13.0}

if ! command -v "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" nvcc > /dev/null; then
  echo "cuda_link_check: SKIPPED: no nvcc on this machine (set CUDA_HOME)"
  exit 77
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
environment=${1:-$scratch}/venv
[ -d "$environment" ] || python3 -m venv "$environment"
# shellcheck disable=SC1091
source "$environment/bin/activate"

echo "== a CUDA build of torch $torch_version"
# Without local wheel folders and settings of pip, which may hold a CPU build of the same version.
PIP_FIND_LINKS='' PIP_CONFIG_FILE=/dev/null python -m pip install --quiet "torch==$torch_version"
python -c "
import sys, torch
print('torch', torch.__version__, 'of CUDA', torch.version.cuda)
sys.exit(torch.version.cuda is None and 'cuda_link_check: this torch was built without CUDA')"

echo "== the extension with every CUDA kernel"
# A copy, so that the build leaves nothing here and the tests meet the installed package.
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$scratch"
cd "$scratch"
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  export TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"
fi
LONGROPE_CUDA=1 python -m pip install --quiet ".[test]"
python - << 'END'
import longrope

info = longrope._C.build_info()
print(info)
assert info["cuda"], "the extension has no CUDA kernels"
END

echo "== CUDA without a device"
printf 'some text, %.0s' {1..100} > text.txt
status=0
CUDA_VISIBLE_DEVICES='' longrope perplexity longrope/demo/model text.txt --length 256 \
  --device cuda 2> refusal.txt || status=$?
cat refusal.txt
[ "$status" = 2 ] && [ "$(wc -l < refusal.txt)" = 1 ] && grep -q "no CUDA device" refusal.txt || {
  echo "cuda_link_check: FAILED: expected exit status 2 and one sentence, got status $status"
  exit 1
}

echo "== the CPU tests against this build"
# shellcheck disable=SC2086
CUDA_VISIBLE_DEVICES='' python -m pytest -q --ignore=tests/test_packaging.py ${TESTS:-}
echo "cuda_link_check: passed"
