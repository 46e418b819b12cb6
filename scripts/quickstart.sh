#!/usr/bin/env bash
# Install this package, encode the documents of examples/quickstart with the small checkpoint, and ask five questions.
#
#   bash scripts/quickstart.sh [--dir DIR] [--model DIR] [--no-install]
#
# Uses the active virtual environment, or else .venv-quickstart in the repository root (made when it is missing). Needs
# Python 3.11 or newer and no GPU.
#
#   --dir DIR      write the bank to DIR and keep it (default: a temporary directory, removed at the end)
#   --model DIR    ask another checkpoint that has a memory_protocol.json
#   --no-install   take the environment as it is
#
# The variable PYTHON chooses the interpreter (3.11 or newer) that a new environment is made with.
set -euo pipefail

MODEL="model_cards/msa-hf-tiny"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

directory=""
model=""
install=1
while (($#)); do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --dir | --model)
            (($# > 1)) && [[ -n "$2" ]] || die "$1 needs a directory"
            path="$2"
            [[ "$path" == /* ]] || path="$PWD/$path"
            if [[ "$1" == --dir ]]; then directory="$path"; else model="$path"; fi
            shift 2
            ;;
        --no-install)
            install=0
            shift
            ;;
        *) die "unknown argument: $1 (see --help)" ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"
model="${model:-$MODEL}"
documents="examples/quickstart/documents.jsonl"
questions="examples/quickstart/questions.jsonl"
for file in "$documents" "$questions" "$model/config.json" "$model/memory_protocol.json"; do
    [[ -f "$file" ]] || die "$file is missing"
done
[[ -z "$directory" || -d "$directory" || ! -e "$directory" ]] || die "$directory is not a directory"

# --- environment ------------------------------------------------------------------------------------------------------

venv="${VIRTUAL_ENV:-$root/.venv-quickstart}"
python="$venv/bin/python"
if [[ -x "$python" ]]; then
    say "environment: $venv"
elif ((install)); then
    interpreter="$(find_python)"
    say "make environment $venv"
    "$interpreter" -m venv "$venv" || die "$venv cannot be made"
else
    die "no environment at $venv: activate one, or run without --no-install"
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$venv has a Python older than 3.11"
use_environment "$venv"

# --- installation -----------------------------------------------------------------------------------------------------

if ((install)); then
    start="$SECONDS"
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip
    failed="the installation failed; pip says why above"
    # --no-build-isolation below builds with these.
    "${pip[@]}" "setuptools>=77" wheel || die "$failed"
    # Before the package, so that pip keeps this torch instead of choosing one.
    if ! "$python" -c 'import torch' 2>/dev/null; then
        say "install $TORCH"
        "${pip[@]}" "$TORCH" || die "$failed"
    fi
    say "install msa-hf"
    "${pip[@]}" --no-build-isolation -e . || die "$failed"
    say "installed in $((SECONDS - start)) s"
fi
command -v msa-hf >/dev/null || die "msa-hf is not installed in $venv: run without --no-install"

# --- documents and questions ------------------------------------------------------------------------------------------

use_few_threads
export TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY:-error}" HF_HUB_OFFLINE=1
export HF_HUB_DISABLE_PROGRESS_BARS=1

start="$SECONDS"
if [[ -z "$directory" ]]; then
    temporary="$(mktemp -d)"
    trap 'rm -rf "$temporary"' EXIT
    bank="$temporary/bank"
else
    mkdir -p "$directory" || die "$directory cannot be made"
    bank="$directory"
fi

options=(--dtype float32) # the fastest and most exact on processors without bfloat16
say "msa-hf encode $model $documents $bank ${options[*]}"
msa-hf encode "$model" "$documents" "$bank" "${options[@]}"

asked=()
while IFS= read -r line; do
    asked+=("$line")
done < <("$python" -c '
import json, sys
for line in open(sys.argv[1], encoding="utf-8"):
    print(json.loads(line)["question"])
' "$questions")
options+=(--documents-per-round 1 --max-new-tokens 32)
say "msa-hf ask $model $bank QUESTION ... ${options[*]} --json"
msa-hf ask "$model" "$bank" "${asked[@]}" "${options[@]}" --json | "$python" scripts/compare_answers.py "$questions"

if [[ -n "$directory" ]]; then
    say "the bank is kept: source $venv/bin/activate; msa-hf ask $model $bank ${options[*]}"
fi
say "documents encoded and questions answered in $((SECONDS - start)) s"
