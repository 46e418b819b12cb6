#!/usr/bin/env bash
# Compiles route_documents with its checks and benchmark, in parallel, and runs it: one command, under two minutes.
#   route_documents.sh [options of the program]         with nvcc, for this machine's GPU
#   route_documents.sh --sanitize                   the checks under compute-sanitizer: memcheck, racecheck
#   route_documents.sh --host [options of the program]  with a C++ compiler, on emulated threads (needs CUDA's headers)
#   ARCH=90a BUILD=directory CUDA=/usr/local/cuda CUBLAS=library   what may be set
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
export build flags_text="${flags[*]}"
compile() { # one file; what stands beside this script is the main program
    name=$(basename "$1" .cu)
    case "$1" in */standalone/*) name=main ;; esac
    nvcc $flags_text -c "$1" -o "$build/$name.o" > "$build/$name.log" 2>&1 || { grep -A3 error "$build/$name.log"; exit 255; }
}
export -f compile
rm -f "$build"/*.o "$build"/*.log
printf '%s\0' "$(dirname "$here")"/route/*.cu "$here/route_documents.cu" |
    xargs -0 -n 1 -P "$(nproc)" bash -c 'compile "$1"' compile
spills=$(cat "$build"/*.log | grep -E "[1-9][0-9]* bytes spill" || true)
[ -z "$spills" ] || echo "register spills: $spills"
grep -h "serialized" "$build"/*.log || true
nvcc "${flags[@]}" -o "$build/route_documents" "$build"/*.o -ldl 2> /dev/null
cublas=${CUBLAS:-$(ldconfig -p 2> /dev/null | sed -n 's/.*libcublas\.so.* => //p' | head -n 1)}
if [ -z "$cublas" ]; then # as pip installs it beside torch
    site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("platlib"))' 2> /dev/null || true)
    [ -z "$site" ] || cublas=$(find "$site/nvidia" -name 'libcublas.so*' 2> /dev/null | head -n 1 || true)
fi
echo "built in $SECONDS s: $build/route_documents"
if [ "${1:-}" = "--sanitize" ]; then
    for tool in memcheck racecheck; do
        echo "== $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$build/route_documents" --check --cases 20
    done
    exit 0
fi
exec "$build/route_documents" ${cublas:+--cublas "$cublas"} "$@"
