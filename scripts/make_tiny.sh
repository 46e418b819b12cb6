#!/usr/bin/env bash
# Make msa-hf-tiny, with the kinds of questions of `msa-hf bench chains` in its training, and measure it.
#
#     bash scripts/make_tiny.sh OUT              # one H200: 19 minutes of training, about 30 in all
#     bash scripts/make_tiny.sh OUT --rehearse   # two minutes of a CPU core, all steps at toy size; the result knows nothing
#
# A step whose result is there is not made again, so that the same command goes on after an interruption. No step takes
# longer than ten minutes on an H200. OUT/model is the checkpoint, OUT/results.json and OUT/chains.json its figures:
# it takes the place of the shipped one only where both are at least as good.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:?name the folder for the results}"
rehearse="${2:-}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
python="${PYTHON:-python}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

if [[ -z "$rehearse" ]]; then
    documents=20000 dense=(--minutes 4.5) first=(--minutes 7) second=(--minutes 7.5) rate=8e-4
    sharp=() sizes=(1000 10000 100000) questions=300 measure=()
    chains=(--sizes 100K,1M,10M --questions 15 --dtype bfloat16 --batch-size 100 --batch-tokens 131072)
elif [[ "$rehearse" == --rehearse ]]; then
    cpu=(--device cpu --workers 0 --no-compile --every 1)
    documents=1500 dense=(--minutes 0.05 --rows 4 --documents 48 "${cpu[@]}") rate=8e-4
    first=(--minutes 0.05 --scale 0.06 --gate 16 --asked 1 --gate-every 1000 "${cpu[@]}") second=("${first[@]}")
    sharp=(--documents 80 --questions 1 --factors 1 2 --device cpu) sizes=(60) questions=2
    measure=(--conditions routed --selections "router, 1 document a round" --device cpu)
    chains=(--sizes 8K --questions 1 --kinds two_hop,three_hop --device cpu)
else
    echo "what is $rehearse? There is --rehearse." >&2
    exit 2
fi

# step NAME COMMAND...: run it unless OUT/NAME is there; it writes to OUT/NAME.part, which then takes that name.
step() {
    local name="$1"
    shift
    [[ -e "$out/$name" ]] && return
    echo "== $name"
    rm -rf "$out/$name.part"
    "$@" --out "$out/$name.part"
    mv "$out/$name.part" "$out/$name"
}
train() { "$python" scripts/train_tiny.py "$@"; }

step tokenizer train tokenizer --documents "$documents"
step dense train dense --tokenizer "$out/tokenizer" "${dense[@]}"
step memory1 train memory --tokenizer "$out/tokenizer" --base "$out/dense" --fall 0 "${first[@]}"
step memory2 train memory --tokenizer "$out/tokenizer" --base "$out/memory1" --seed 7 --fall 0.7 \
    --rate "$rate" --router-rate "$rate" "${second[@]}"
step model train sharpen --tokenizer "$out/tokenizer" --model "$out/memory2" "${sharp[@]}"
echo "== results.json"
"$python" scripts/eval_tiny.py "$out/model" --documents "${sizes[@]}" --questions "$questions" \
    --prose "$out/tokenizer/prose.json" --out "$out/results.json" "${measure[@]}"
echo "== chains.json"
"$python" -m msa_hf bench chains "$out/model" "${chains[@]}" --out "$out/chains.json" \
    --html "$out/chains.html" --quiet
