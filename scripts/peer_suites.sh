#!/usr/bin/env bash
# Runs the suites of transformers and PEFT against models with a memory, and prints what fails on ours and not on the
# base. Nothing of theirs is kept: the source distributions of the installed versions are fetched from the registry.
#
#   scripts/peer_suites.sh [transformers|peft]... [-- PYTEST ARGUMENTS]
#
# PYTHON: the interpreter, in whose environment the package is installed (default: python).
# TRANSFORMERS_SOURCE: a checkout of transformers at the installed release. Its source distribution leaves out the mixins
# of generation and export, which a checkout holds; tests/model/test_as_the_base.py covers them otherwise.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)/peers"
python="${PYTHON:-python}"
suites=()
while (($#)) && [ "$1" != "--" ]; do suites+=("$1"); shift; done
(($#)) && shift
((${#suites[@]})) || suites=(transformers peft)

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$python" -m pip install -q --no-deps --target "$work/site" parameterized

version_of() { "$python" -c "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))" "$1"; }

status=0
for suite in "${suites[@]}"; do
    case "$suite" in transformers | peft) ;; *) echo "no suite '$suite': transformers or peft" >&2; exit 2 ;; esac
    version="$(version_of "$suite")"
    if [ "$suite" = transformers ] && [ -n "${TRANSFORMERS_SOURCE:-}" ]; then
        source="$TRANSFORMERS_SOURCE"
    else
        "$python" -m pip download -q --no-binary :all: --no-deps --no-build-isolation -d "$work" "$suite==$version"
        tar -xzf "$work/$suite-$version.tar.gz" -C "$work"
        source="$work/$suite-$version"
        rm -rf "$source/src"  # the installed package is tested, not this copy
        touch "$source/tests/__init__.py"
    fi
    echo "== $suite $version"
    # Tests that fail are compared below.
    (cd "$here" && HF_HUB_OFFLINE=1 PYTHONPATH="$source:$here:$work/site${PYTHONPATH:+:$PYTHONPATH}" \
        "$python" -m pytest -q -c /dev/null --rootdir "$here" -p no:cacheprovider -p outcomes --disable-warnings --tb=no -r N \
        --outcomes "$work/$suite.json" "suite_$suite.py" "$@") || true
    "$python" "$here/compare.py" "$suite" "$work/$suite.json" || status=1
done
exit $status
