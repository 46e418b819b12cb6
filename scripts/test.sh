#!/usr/bin/env bash
# Install what the tests need, then run them.
#
#   bash scripts/test.sh [--transformers VERSION] [pytest args...]
#
# Without --transformers: uses the active virtual environment, or else .venv in the repository root (made when it is
# missing), and runs ruff, mypy, pytest, and, where nvcc is, compiles the CUDA kernels (tools/check_cuda.py). All other
# arguments go to pytest. Without any, banks are tortured beside all this for three minutes (benchmarks/torture_bank.py).
#
# With --transformers VERSION: always uses an environment of its own, .venv-transformers-VERSION, because versions of
# transformers differ in the huggingface-hub they accept. Runs pytest only, on tests/goldens and those of tests/model that
# meet transformers itself, unless the arguments name other paths. Where .venv has been made, the new environment begins
# as a copy of it.
#
# The variable PYTHON chooses the interpreter (3.11 or newer) that a new environment is made with.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

version=""
pytest_args=()
while (($#)); do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --transformers)
            (($# > 1)) || die "--transformers needs a version"
            version="$2"
            shift 2
            ;;
        --transformers=*)
            version="${1#*=}"
            shift
            ;;
        *)
            pytest_args+=("$1")
            shift
            ;;
    esac
    [[ "$version" =~ ^[0-9A-Za-z.]*$ ]] || die "not a version: $version"
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"

# step LABEL COMMAND...: run the command and say how long it took; the status is the command's.
step() {
    local label="$1" start="$SECONDS" status=0
    shift
    say "$label"
    "$@" || status=$?
    if ((status == 0)); then
        say "$label: done in $((SECONDS - start)) s"
    else
        say "$label: FAILED (status $status) after $((SECONDS - start)) s"
    fi
    return "$status"
}

# --- environment ------------------------------------------------------------------------------------------------------

# A file in the environment that holds what was installed from. With the quick look below, it spares pip a whole
# resolution.
STAMP=.msa-hf-test-stamp

# fingerprint PYTHON VERSION: of an environment by this interpreter, with this version of transformers.
fingerprint() {
    "$1" - "$root" "$2" "$TORCH" <<'PY'
import hashlib, pathlib, sys

root, *rest = sys.argv[1:]
digest = hashlib.sha256(repr((root, rest, sys.version_info[:3])).encode())
for name in ("pyproject.toml", "setup.py"):
    digest.update(pathlib.Path(root, name).read_bytes())
print(digest.hexdigest())
PY
}

make_venv() {
    local interpreter
    interpreter="$(find_python)" || return
    "$interpreter" -m venv "$1"
}

# copy_venv FROM TO: an environment with the packages of another, as hard links where the file system has them.
copy_venv() {
    "$1/bin/python" -m venv --without-pip "$2"
    "$2/bin/python" - "$("$1/bin/python" -c "$site_packages")" "$("$2/bin/python" -c "$site_packages")" <<'PY'
import os, shutil, sys

def link(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

shutil.copytree(*sys.argv[1:], symlinks=True, copy_function=link, dirs_exist_ok=True)
PY
}
site_packages='import sysconfig; print(sysconfig.get_path("purelib"))'

base="${VIRTUAL_ENV:-$root/.venv}"
venv="$base"
[[ -z "$version" ]] || venv="$root/.venv-transformers-$version"
python="$venv/bin/python"
# Whether there is an environment of the newest transformers to begin with.
begun=""
if [[ -n "$version" && -f "$base/$STAMP" && "$(<"$base/$STAMP")" == "$(fingerprint "$base/bin/python" "")" ]]; then
    begun=yes
fi
copied=""
if [[ -x "$python" ]]; then
    say "environment: $venv"
elif [[ -n "$begun" ]]; then
    step "copy environment $base to $venv" copy_venv "$base" "$venv"
    copied=yes
else
    step "make environment $venv" make_venv "$venv"
fi
"$python" -m pip --version >/dev/null 2>&1 || step "install pip" "$python" -m ensurepip

use_environment "$venv"
# What is imported is compiled then, and once; of all that is installed, that is little.
pip+=(--no-compile)
unset PYTHONDONTWRITEBYTECODE

# --- installation -----------------------------------------------------------------------------------------------------

stamp="$venv/$STAMP"

is_installed() {
    [[ -f "$stamp" && "$(<"$stamp")" == "$(fingerprint "$python" "$version")" ]] || return 1
    "$python" - "$version" <<'PY'
import sys
from importlib import metadata, util

wanted = sys.argv[1]
try:
    found = metadata.version("transformers")
    metadata.version("msa-hf")
except metadata.PackageNotFoundError:
    sys.exit(1)
modules = ("torch", "pytest", "xdist", "gguf", "hypothesis", "accelerate", "peft", "datasets", "bm25s", "matplotlib", "pdoc", "ruff", "mypy")
sys.exit(not all(util.find_spec(name) for name in modules) or (wanted != "" and found != wanted))
PY
}

if is_installed; then
    say "packages: already installed"
else
    rm -f "$stamp"
    # --no-build-isolation below builds with these.
    [[ -n "$copied" ]] || step "install setuptools and wheel" "${pip[@]}" "setuptools>=77" wheel
    # Before the package, so that pip keeps this torch instead of choosing one.
    if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        say "torch: already installed"
    else
        step "install $TORCH" "${pip[@]}" "$TORCH"
    fi
    # In a copy, all that the tests need is there already; what transformers asks for may have to change.
    requirements=(-e ".[test]")
    [[ -z "$copied" ]] || requirements=(-e .)
    [[ -z "$version" ]] || requirements+=("transformers==$version")
    # The native operations are built below, once.
    step "install ${requirements[*]}" env MSA_HF_BUILD=none "${pip[@]}" --no-build-isolation "${requirements[@]}"
    [[ -z "$copied" ]] || "$python" -m pip check
    fingerprint "$python" "$version" >"$stamp"
fi
# Compiles what has changed of csrc/ since the last time; says so in one line where it cannot, which fails no test.
# The library is the same for all environments, and would be compiled anew for each.
builder="$python"
[[ -z "$begun" ]] || builder="$base/bin/python"
step "build native operations" "$builder" setup.py -q build_ext --inplace
"$python" - <<'PY'
import sys
from importlib import metadata

versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "huggingface-hub"))
print(f"== python {sys.version.split()[0]}, {versions}")
PY

# --- checks -----------------------------------------------------------------------------------------------------------

# Two files are tested at once, beside others' processes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
use_few_threads

names_a_path() {
    local argument
    for argument in "$@"; do
        [[ "$argument" != -* && -e "${argument%%::*}" ]] && return 0
    done
    return 1
}

failed=()
# Every check runs, so that one run shows all that is wrong.
check() { step "$@" || failed+=("$1"); }

# ended PROCESS LOG: whether a check that runs already ends well; says its last line, or else all that it said.
ended() {
    local status=0
    wait "$1" || status=$?
    if ((status == 0)); then
        tail -n 1 "$2"
    else
        cat "$2"
    fi
    return "$status"
}

torture=""
typing=""
in_memory=""
logs="$(mktemp -d)" # of what runs beside the tests
tidy() {
    local process
    for process in $torture $typing; do kill "$process" 2>/dev/null || true; done
    rm -rf "$logs" ${in_memory:+"$in_memory"}
}
trap tidy EXIT
if [[ -z "$version" && ${#pytest_args[@]} -eq 0 ]] && [[ -r /proc/self/maps ]]; then
    say "torture of banks: runs beside the rest for 3 minutes"
    # What it judges by a clock, it judges by that of its own processes: others beside it only make it try less. It takes
    # what the tests leave, for they decide how long all this takes.
    TQDM_DISABLE=1 nice -n 15 "$python" benchmarks/torture_bank.py --minutes 3 >"$logs/torture" 2>&1 &
    torture="$!"
fi
if [[ -z "$version" ]]; then
    check "ruff check" "$python" -m ruff check
    check "ruff format --check" "$python" -m ruff format --check
    # One core would wait for it, so it runs beside the tests.
    "$python" -m mypy src/msa_hf >"$logs/mypy" 2>&1 &
    typing="$!"
    if command -v nvcc >/dev/null; then
        check "CUDA kernels" "$python" tools/check_cuda.py
    else
        say "CUDA kernels: not compiled, there is no nvcc"
    fi
elif ! names_a_path ${pytest_args[@]+"${pytest_args[@]}"}; then
    # What meets transformers itself: its cache, generation, checkpoints, attention and configurations. Arithmetic, files of
    # banks, training and the compiler's work are the same under every version.
    pytest_args+=(tests/goldens)
    for name in as_the_base as_transformers checkpoints generate_options generation static_cache versions; do
        pytest_args+=("tests/model/test_$name.py")
    done
fi
# Every commit of a bank is flushed, which takes a disk longer than all else that these tests do: their files are in memory
# where it has room, and those of a test that passed are removed at once.
files=(-o tmp_path_retention_policy=failed)
if [[ -w /dev/shm ]] && (($(df -k --output=avail /dev/shm | tail -n 1) > 4000000)); then
    in_memory="$(mktemp -d /dev/shm/msa-hf-tests.XXXXXX)"
    files+=("--basetemp=$in_memory/files")
fi
# The models are tiny and run on one thread each, so every core takes its own files. In the order of the folders: those of
# few tests last, as is usual, would let one core wait for the slowest test of all.
workers=auto
# Many of all the tests wait, for a disk or a deadline: one process more than there are cores has something to do then.
[[ -n "$version" || ${#pytest_args[@]} -gt 0 ]] || workers="$(($(getconf _NPROCESSORS_ONLN) + 1))"
spread=(--numprocesses "$workers" --dist loadfile --no-loadscope-reorder)
# Of a test with very many cases some stand for all, but every family of models runs; a run that names what it tests has
# them all.
names_a_test() { [[ " ${pytest_args[*]-} " == *" -k "* || " ${pytest_args[*]-} " == *"::"* ]]; }
names_a_test || spread+=(--cases 18)
check "pytest" "$python" -m pytest -q -p no:cacheprovider "${spread[@]}" "${files[@]}" ${pytest_args[@]+"${pytest_args[@]}"}
[[ -z "$typing" ]] || check "mypy" ended "$typing" "$logs/mypy"
[[ -z "$torture" ]] || check "torture of banks" ended "$torture" "$logs/torture"

if ((${#failed[@]})); then
    printf 'error: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
say "all passed in $SECONDS s"
