#!/usr/bin/env bash
# One command for a short time on a borrowed GPU: build, check, measure, the most telling things
# first, each step cut off at its limit or at what is left of the budget, each result in a file the
# moment it exists. A step that fails does not stop the next ones.
#   BUDGET=530 OUT=FOLDER bash .ci/gpu_check.sh [STEP ...]
# BUDGET: seconds in all. OUT: folder for summary.txt, log.txt, results.csv (rows that name GPU,
# torch and commit), tests.xml, ncu.csv, example.txt and smollm2.txt. Steps: all of those below, or the named
# ones, in the same order. MODEL: folder of SmolLM2 (benchmarks/smollm2.py), DATA: a long text; the
# last step needs both. REHEARSE=1 runs the flow on a CPU, small.
# It builds in place and installs nothing. PREBUILT=FOLDER takes an extension that was built
# elsewhere for this torch (.ci/gpu_prebuilt.sh); where it cannot be imported one is built. COMMIT
# names the commit of a copy without its history. Needs torch with CUDA, transformers, pytest and
# hypothesis, with pytest-xdist more tests in the time; nvcc to build; no network.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu_check}
budget=${BUDGET:-530}
mkdir -p "$out" || exit 2
out=$(realpath "$out")
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=$(command -v python3 || command -v python) || { echo "gpu_check: no python3" >&2; exit 2; }
device=cuda quick=()
[ -z "${REHEARSE:-}" ] || { device=cpu quick=(--quick --rounds 1 --seconds 0.01); }
wanted=" $* "
failed=0

left() { echo $((budget - SECONDS)); }

# step NAME LIMIT COMMAND...: runs it if it is wanted and there is time, with its output in the log.
step() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  [[ $wanted =~ ^\ *$ || $wanted == *" $name "* ]] || return 0
  [ "$limit" -le "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 10 ]; then
    echo "$name: no time left" | tee -a "$out/summary.txt"
    return 0
  fi
  echo "== $name" >> "$out/log.txt"
  timeout -k 5 "$limit" "$@" >> "$out/log.txt" 2>&1
  status=$?
  echo "$name: status $status, $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
  [ "$status" = 0 ] || failed=$((failed + 1))
  return "$status"
}

measure() { "$python" "benchmarks/$1.py" --device "$device" --csv "$out/results.csv" "${@:2}" "${quick[@]}"; }
loads() { "$python" -c 'import longrope, sys; sys.exit(not longrope._C.build_info()["cuda"])'; }
build() {
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))')} \
    LONGROPE_CUDA=1 MAX_JOBS=$(nproc) "$python" setup.py build_ext --inplace
}
sanitize() {
  command -v compute-sanitizer || return 127
  # Without torch's caching allocator, so that an access past a tensor leaves its allocation.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 99 \
    "$python" .ci/gpu_smoke.py --small
}
profile() {
  ncu --clock-control none --set basic -c 12 -k 'regex:attention|rope|nll' --csv \
    --log-file "$out/ncu.csv" "$python" .ci/gpu_smoke.py --large
}
facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -2
  "$python" -c '
import torch, transformers
print("torch", torch.__version__, "CUDA", torch.version.cuda, "transformers", transformers.__version__)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
  command -v compute-sanitizer ncu
}

# The functions are for the steps, whose commands run under timeout: a shell of their own.
export python device out
export -f measure loads build sanitize profile facts
run() { local name=$1 limit=$2; shift 2; step "$name" "$limit" bash -c 'quick=('"${quick[*]}"'); "$@"' _ "$@"; }

small=()
if [ "$device" = cuda ]; then
  run facts 20 facts
  [ -z "${PREBUILT:-}" ] || cp "$PREBUILT"/_C.*.so longrope/
  if ! loads 2> /dev/null; then
    rm -f longrope/_C.*.so  # of another torch or Python: newer than the sources all the same
    run build 200 build
  fi
  run import 30 loads || exit 1
else
  small=(--small)
fi
run smoke 60 "$python" .ci/gpu_smoke.py --device "$device" "${small[@]}"
run ceilings 30 "$python" .ci/gpu_ceilings.py --device "$device" --csv "$out/results.csv" "${quick[@]}"
spread=()  # over processes where pytest-xdist is there
"$python" -c 'import xdist' 2> /dev/null && [ "$device" = cuda ] && spread=(-n 12)
run tests 120 env OMP_NUM_THREADS=1 "$python" -m pytest -q "${spread[@]}" -p no:cacheprovider --tb=short \
  tests/ops tests/test_devices.py \
  -k "$([ "$device" = cuda ] && echo cuda and not emulat || echo opcheck)" --junitxml "$out/tests.xml"
run attention 80 measure bench_attention --rounds 5
run nll 45 measure bench_perplexity --dtype bfloat16 --shape 8192 4096 32000 --rounds 5
run rope 60 measure bench_rope --tokens 65536 --graph --rounds 3
run search 60 measure bench_search --dtype bfloat16 --rounds 3
[ "$device" = cpu ] || run example 60 bash -c '"$python" benchmarks/readme_example.py --seconds 20 \
  2>&1 | tee "$out/example.txt"'
if [ "$device" = cuda ]; then
  for tool in memcheck racecheck synccheck initcheck; do run "$tool" 60 sanitize "$tool"; done
  run profile 60 profile
fi
if [ -n "${MODEL:-}" ] && [ -n "${DATA:-}" ]; then
  run smollm2 120 bash -c '"$python" -m longrope search "$MODEL" "$DATA" --target-length 65536 \
    --device "$device" --out "$out/run" > "$out/smollm2.txt" 2>&1; status=$?
    rm -rf "$out/run"; exit $status'
fi

echo "== $out"
cat "$out/summary.txt"
[ ! -e "$out/results.csv" ] || "$python" -c '
import csv, sys
for row in csv.reader(open(sys.argv[1])):
    print(" | ".join(row[:8]))' "$out/results.csv"
exit $((failed > 0))
