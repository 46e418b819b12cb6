#!/usr/bin/env bash
# Compiles route_documents with its checks and benchmark, in parallel, and runs it: one command, under two minutes.
#   route_documents.sh [options of the program]         with nvcc, for this machine's GPU
#   route_documents.sh --host [options of the program]  with a C++ compiler, on emulated threads (needs CUDA's headers)
#   ARCH=90a BUILD=directory CUDA=/usr/local/cuda        what may be set
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=${BUILD:-$(mktemp -d)}
mkdir -p "$build"
if [ "${1:-}" = "--host" ]; then
    shift
    cuda=${CUDA:-/usr/local/cuda}
    "${CXX:-g++}" -x c++ -std=c++17 -O2 -DMSA_HF_EMULATE -DMSA_HF_ALL_SHAPES -w -isystem "$cuda/include" \
        -o "$build/route_documents_host" "$here/route_documents.cu"
    exec "$build/route_documents_host" "$@"
fi
arch=${ARCH:-90a}
flags=(-std=c++17 -O3 -DMSA_HF_ALL_SHAPES -gencode "arch=compute_$arch,code=sm_$arch" -Xptxas -v)
sources=("$here"/../route_documents*.cu "$here/route_documents.cu")
objects=()
pids=()
for source in "${sources[@]}"; do
    name=$(basename "$source" .cu)
    [ "$(dirname "$source")" = "$here" ] && name=main_$name
    objects+=("$build/$name.o")
    nvcc "${flags[@]}" -c "$source" -o "$build/$name.o" > "$build/$name.log" 2>&1 &
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
if [ $failed = 1 ]; then
    grep -h -A3 error "$build"/*.log
    exit 1
fi
spills=$(cat "$build"/*.log | grep -E "[1-9][0-9]* bytes spill" || true)
[ -z "$spills" ] || echo "register spills: $spills"
grep -h "serialized" "$build"/*.log || true
nvcc "${flags[@]}" -o "$build/route_documents" "${objects[@]}" -ldl 2> /dev/null
cublas=${CUBLAS:-$(ldconfig -p 2> /dev/null | sed -n 's/.*libcublas\.so.* => //p' | head -n 1)}
[ -n "$cublas" ] || cublas=$(find / -name 'libcublas.so*' -not -path '/proc/*' 2> /dev/null | head -n 1 || true)
exec "$build/route_documents" ${cublas:+--cublas "$cublas"} "$@"
