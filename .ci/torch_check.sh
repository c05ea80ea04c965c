#!/usr/bin/env bash
# Install longrope beside one version of torch in a fresh virtual environment, and run the tests of
# the ops against what was installed:
#   bash .ci/torch_check.sh VERSION [FOLDER [PYTEST ARGUMENTS]]
# FOLDER (default, and where it is empty: a temporary one, removed at the end) keeps the virtual
# environment for the next run. -k "not emulated" leaves out what hardly depends on torch, the CUDA
# sources run on the CPU, and takes a fraction of the time. The last line is what belongs into the table of CONTRIBUTING.md. The build is for the CPU
# (LONGROPE_CUDA=0); .ci/cuda_link_check.sh builds the CUDA kernels. A CUDA build of torch takes
# about 5 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?torch_check: expected a version of torch, such as 2.13.0}
sources=$PWD

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
environment=${2:-$scratch}/venv
[ -d "$environment" ] || python3 -m venv "$environment"
# shellcheck disable=SC1091
source "$environment/bin/activate"
python -m pip install --quiet --upgrade pip

echo "== torch $version"
python -m pip install --quiet "torch==$version"

echo "== pip install ."
# Verbose for the one line about a torch that is newer than those tried; pip hides it otherwise.
LONGROPE_CUDA=0 python -m pip install --verbose ".[test]" > "$scratch/log" 2>&1 ||
  { tail -n 40 "$scratch/log"; exit 1; }
grep "longrope: torch" "$scratch/log" || true

echo "== the tests of the ops"
# From another folder, so that nothing but the installed package can be imported.
cd "$scratch"
python - "$sources" << 'END'
import sys
from pathlib import Path

import longrope

assert Path(sys.argv[1]) not in Path(longrope.__file__).resolve().parents, longrope.__file__
print(longrope.__file__, longrope._C.build_info())
END
pytest -q -c "$sources/pyproject.toml" --rootdir "$sources" -p no:cacheprovider \
  "$sources/tests/ops" "${@:3}" | tee results
installed=$(python -c 'import platform, torch; print(torch.__version__, platform.python_version())')
echo "torch_check: torch and Python $installed: $(tail -n 1 results)"
