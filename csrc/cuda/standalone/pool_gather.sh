#!/usr/bin/env bash
# Compiles pool_chunks and gather_documents with their checks and benchmark, and runs them: one command, under a minute.
#   pool_gather.sh [options of the program]         with nvcc, for this machine's GPU
#   pool_gather.sh --sanitize                       the checks under compute-sanitizer: memcheck, racecheck, initcheck
#   pool_gather.sh --host [options of the program]  with a C++ compiler, on emulated threads (needs CUDA's headers)
#   ARCH=90a BUILD=directory CUDA=/usr/local/cuda   what may be set
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=${BUILD:-$(mktemp -d)}
mkdir -p "$build"
if [ "${1:-}" = "--host" ]; then
    shift
    "${CXX:-g++}" -x c++ -std=c++17 -O2 -DMSA_HF_EMULATE -w -pthread -isystem "${CUDA:-/usr/local/cuda}/include" \
        -o "$build/pool_gather_host" "$here/pool_gather.cu"
    exec "$build/pool_gather_host" "$@"
fi
arch=${ARCH:-90a}
nvcc -std=c++17 -O3 -lineinfo -gencode "arch=compute_$arch,code=sm_$arch" -Xptxas -v -o "$build/pool_gather" \
    "$here/pool_gather.cu" > "$build/pool_gather.log" 2>&1 || {
    cat "$build/pool_gather.log"
    exit 1
}
grep -E "[1-9][0-9]* bytes spill" "$build/pool_gather.log" || true
if [ "${1:-}" = "--sanitize" ]; then
    for tool in memcheck racecheck initcheck; do
        echo "== $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$build/pool_gather" --check --cases 40
    done
    exit 0
fi
exec "$build/pool_gather" "$@"
