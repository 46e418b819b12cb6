# What quickstart.sh and test.sh share: messages, and how a virtual environment is made. Sourced, never run.

TORCH="torch==2.13.0" # what is installed where no torch can be imported

# The comment at the top of the script that runs.
usage() { awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"; }
say() { printf '== %s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer with the venv module found: install one, or name it in PYTHON"
}

# use_environment DIR: the environment's own scripts come first; nothing that follows depends on an activated one.
use_environment() {
    export VIRTUAL_ENV="$1" PATH="$1/bin:$PATH"
    unset PYTHONHOME
    pip=("$1/bin/python" -m pip install --disable-pip-version-check --quiet)
}

# Suits two cores; more threads than cores slow small tensors down.
use_few_threads() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-2}"
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
}
