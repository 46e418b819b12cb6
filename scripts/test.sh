#!/usr/bin/env bash
# Install what the tests need, then run them.
#
#   bash scripts/test.sh [--transformers VERSION] [pytest args...]
#
# Without --transformers: uses the active virtual environment, or else .venv in the repository root (made when it is
# missing), and runs ruff, mypy, pytest, and, where nvcc is, compiles the CUDA kernels (tools/check_cuda.py). All other
# arguments go to pytest.
#
# With --transformers VERSION: always uses an environment of its own, .venv-transformers-VERSION, because versions of
# transformers differ in the huggingface-hub they accept. Runs pytest only, on tests/model and tests/goldens unless
# the arguments name other paths.
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

make_venv() {
    local interpreter
    interpreter="$(find_python)" || return
    "$interpreter" -m venv "$1"
}

if [[ -n "$version" ]]; then
    venv="$root/.venv-transformers-$version"
elif [[ -n "${VIRTUAL_ENV:-}" ]]; then
    venv="$VIRTUAL_ENV"
else
    venv="$root/.venv"
fi
python="$venv/bin/python"
if [[ -x "$python" ]]; then
    say "environment: $venv"
else
    step "make environment $venv" make_venv "$venv"
fi
"$python" -m pip --version >/dev/null 2>&1 || step "install pip" "$python" -m ensurepip

use_environment "$venv"

# --- installation -----------------------------------------------------------------------------------------------------

# The stamp holds what was installed from. With the quick look at the environment, it spares pip a whole resolution.
stamp="$venv/.msa-hf-test-stamp"

fingerprint() {
    "$python" - "$root" "$version" "$TORCH" <<'PY'
import hashlib, pathlib, sys

root, *rest = sys.argv[1:]
digest = hashlib.sha256(repr((root, rest, sys.version_info[:3])).encode())
for name in ("pyproject.toml", "setup.py"):
    digest.update(pathlib.Path(root, name).read_bytes())
print(digest.hexdigest())
PY
}

is_installed() {
    [[ -f "$stamp" && "$(<"$stamp")" == "$(fingerprint)" ]] || return 1
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
    step "install setuptools and wheel" "${pip[@]}" "setuptools>=77" wheel
    # Before the package, so that pip keeps this torch instead of choosing one.
    if "$python" -c 'import torch' 2>/dev/null; then
        say "torch: already installed"
    else
        step "install $TORCH" "${pip[@]}" "$TORCH"
    fi
    requirements=(-e ".[test]")
    [[ -z "$version" ]] || requirements+=("transformers==$version")
    step "install ${requirements[*]}" "${pip[@]}" --no-build-isolation "${requirements[@]}"
    fingerprint >"$stamp"
fi
# Compiles what has changed of csrc/ since the last time; says so in one line where it cannot, which fails no test.
step "build native operations" "$python" setup.py -q build_ext --inplace
"$python" - <<'PY'
import sys
from importlib import metadata

versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "huggingface-hub"))
print(f"== python {sys.version.split()[0]}, {versions}")
PY

# --- checks -----------------------------------------------------------------------------------------------------------

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

if [[ -z "$version" ]]; then
    check "ruff check" "$python" -m ruff check
    check "ruff format --check" "$python" -m ruff format --check
    check "mypy" "$python" -m mypy src/msa_hf
    if command -v nvcc >/dev/null; then
        check "CUDA kernels" "$python" tools/check_cuda.py
    else
        say "CUDA kernels: not compiled, there is no nvcc"
    fi
elif ! names_a_path ${pytest_args[@]+"${pytest_args[@]}"}; then
    pytest_args+=(tests/model tests/goldens)
fi
# The models are tiny and run on one thread each, so every core takes its own files.
check "pytest" "$python" -m pytest -q -p no:cacheprovider --numprocesses auto --dist loadfile ${pytest_args[@]+"${pytest_args[@]}"}

if ((${#failed[@]})); then
    printf 'error: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
say "all passed in $SECONDS s"
