#!/usr/bin/env bash
# Everything of this repository that needs an NVIDIA GPU, step by step; a step that fails does not keep the others back.
#
#   bash tools/check_gpu.sh OUT [step...]
#
#   kernels    build the CUDA kernels without torch, check them against plain loops, time them
#   build      build the extension for CUDA, in the checkout
#   tests      the tests of the operations on every backend, and of models and their attention on the GPU
#   sanitize   the kernels' checks under compute-sanitizer
#   bench      benchmarks/bench_ops.py: every figure of docs/performance.md
#   model      benchmarks/bench_model.py: whole questions, compiled and not, beside their base; it refuses what is not right
#   tiers      a bank in tiers: its tests on the GPU, and benchmarks/bench_tiers.py, which wants an H200 (docs/scaling.md)
#
# Without steps: all of them, in this order. OUT gets a log per step, and the benchmark's JSON. Needs nvcc, a torch built
# for CUDA and pytest; the variable PYTHON chooses the interpreter (python3), HOST_MEMORY says how many GB of host memory
# the bank in tiers may take (default: what is free).
set -uo pipefail

usage() { awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

steps=(kernels build tests sanitize bench model tiers)
(($# > 0)) && [[ "$1" != -* ]] || { usage; exit 2; }
mkdir -p "$1" && out="$(cd "$1" && pwd)" || die "cannot make the directory $1"
shift
for step in "$@"; do
    [[ " ${steps[*]} " == *" $step "* ]] || die "no such step: $step (there are: ${steps[*]})"
done
(($# == 0)) || steps=("$@")
python="${PYTHON:-python3}"
for tool in nvidia-smi nvcc "$python"; do
    command -v "$tool" >/dev/null || die "there is no $tool on the PATH"
done
nvidia-smi -L >"$out/gpu.txt" 2>&1 && grep -q GPU "$out/gpu.txt" || die "this machine has no NVIDIA GPU"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" BUILD="${BUILD:-$PWD/build/kernels}" PYTHONUNBUFFERED=1

kernels() {
    local status=0
    bash csrc/cuda/standalone/route_documents.sh || status=1
    bash csrc/cuda/standalone/pool_gather.sh || status=1
    return $status
}

build() {
    MSA_HF_BUILD=cuda "$python" setup.py -q build_ext --inplace && "$python" -m msa_hf.doctor
}

tests() { # what has a CUDA device among its places; the rest runs too, and costs a minute
    "$python" -m pytest -q -p no:cacheprovider tests/ops tests/model/test_attention.py tests/model/test_recording.py
}

sanitize() {
    local status=0
    bash csrc/cuda/standalone/route_documents.sh --sanitize || status=1
    bash csrc/cuda/standalone/pool_gather.sh --sanitize || status=1
    return $status
}

bench() {
    "$python" benchmarks/bench_ops.py --json "$out/bench_ops.json"
}

model() {
    "$python" benchmarks/bench_model.py --json "$out/bench_model.json"
}

tiers() {
    "$python" -m pytest -q -p no:cacheprovider tests/bank/test_tiers.py || return 1
    "$python" benchmarks/bench_tiers.py --backend cuda ${HOST_MEMORY:+--host-memory "$HOST_MEMORY"} --json "$out/bench_tiers.json"
}

failed=()
for step in "${steps[@]}"; do
    start=$SECONDS
    printf '== %s\n' "$step"
    if "$step" >"$out/$step.log" 2>&1; then
        printf '== %s: done in %s s\n' "$step" $((SECONDS - start))
    else
        failed+=("$step")
        printf '== %s: FAILED after %s s\n' "$step" $((SECONDS - start))
    fi
    tail -n 40 "$out/$step.log"
done
if ((${#failed[@]})); then
    printf 'error: failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
