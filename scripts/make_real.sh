#!/usr/bin/env bash
# Train and measure a real model on real text, every stage beside those that it does not need.
#
#     bash scripts/make_real.sh data OUT --base BASE --data DATA --teacher TEACHER [--parts 0-10] [--minutes 1.5] [--limit N] \
#         [--no-words] [--spans N] [--reader CHECKPOINT]
#     bash scripts/make_real.sh train OUT NAME [arguments of train_real.py routers...]
#     bash scripts/make_real.sh finish OUT NAME --initial OUT/OTHER.pt [arguments of real_corpus.py...]
#     bash scripts/make_real.sh measure OUT NAME [arguments of eval_real.py read...]
#
# `data` makes passages, questions that the base asks (for so many minutes), what the teacher says of both, rows that read,
# BM25's rankings, and words that teach (minutes of a CPU; without them `train` needs --no-words too). With --spans it also cuts
# queries out of N passages, for `train ... --spans`; with --reader, a trained checkpoint or adapter, it makes rows that read of
# those asked questions whose answers that finds likely, for `train ... --read-asked 0.6`. `train` makes
# OUT/NAME.pt from them, and its curve; as often as wanted, under other names. `finish` trains the routers of such a checkpoint
# against all passages, on one GPU, and makes another.
# `measure` makes the adapter, searches with all systems, puts them together, reads, and writes tables and plots to
# OUT/NAME/. All GPUs are used. What is there already is not made again, so that the same command goes on after an interruption;
# logs are in OUT/logs.
#
# With --limit N, documents of each source, everything runs on a CPU: a rehearsal.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
what="${1:-}" out="${2:-}"
[[ "$what" =~ ^(data|train|finish|measure)$ && -n "$out" ]] || { usage; exit 2; }
shift 2
mkdir -p "$out/logs"
out="$(cd "$out" && pwd)"
python="${PYTHON:-python}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
shards=$((gpus > 0 ? gpus : 1))
launch=("$python")
((shards == 1)) || launch=(torchrun --nproc-per-node "$shards")
begun=$SECONDS

# stage RESULT NAME COMMAND...: run it unless the result is there, with a log of its own.
stage() {
    local result="$1" name="$2" start=$SECONDS
    shift 2
    [[ -e "$result" ]] && return
    if ! "$@" >"$out/logs/$name.log" 2>&1; then
        say "$name FAILED after $((SECONDS - start)) s; the end of $out/logs/$name.log:"
        tail -n 20 "$out/logs/$name.log"
        return 1
    fi
    say "$name: $((SECONDS - start)) s, $((SECONDS - begun)) s since the start"
}
# when FILE... -- COMMAND...: as soon as all files are there; gives up where a stage has failed.
when() {
    while [[ "$1" != -- ]]; do
        until [[ -e "$1" ]]; do
            [[ ! -e "$out/failed" ]] || return 1
            sleep 0.3
        done
        shift
    done
    "${@:2}"
}
# beside COMMAND...: in the background; `together` waits for all of these.
beside() { { "$@" || { touch "$out/failed"; false; }; } & }
together() {
    local process status=0
    for process in $(jobs -p); do wait "$process" || status=1; done
    ((status == 0)) || exit 1
}
on_gpu() { CUDA_VISIBLE_DEVICES="$([[ "$gpus" == 0 ]] || echo "$1")" "${@:2}"; }

if [[ "$what" == data ]]; then
    base="" data="" teacher="" parts=0-10 minutes=1.5 limit=() with_words=yes spans=0 reader=""
    while (($#)); do
        case "$1" in
            --no-words)
                with_words=""
                shift
                continue
                ;;
            --base) base="$2" ;;
            --data) data="$2" ;;
            --teacher) teacher="$2" ;;
            --parts) parts="$2" ;;
            --minutes) minutes="$2" ;;
            --spans) spans="$2" ;;
            --reader) reader="$2" ;;
            --limit) limit=(--limit "$2") ;;
            *) die "what is $1?" ;;
        esac
        shift 2
    done
    [[ -n "$base" && -n "$data" && -n "$teacher" ]] || die "data needs --base, --data and --teacher"
    printf '%s\n' "$base" >"$out/base"
    printf '%s\n' "$parts" >"$out/parts"
    rm -f "$out/failed"
    train() { "$python" scripts/train_real.py "$1" --work "$out" "${@:2}"; }
    asking=() checking=()
    [[ -z "${limit[*]}" ]] || checking=(--likely 100 --workers 2 --batch-tokens 3000 --no-compile)
    [[ -z "${limit[*]}" ]] || asking=(--ask-steps 2 --ask-batch 4 --batch-tokens 3000 --largest 24 --no-compile)
    prepared=()
    for number in $(seq "${parts%-*}" "${parts#*-}"); do
        part="$(printf '%s/part%02d.pt' "$out" "$number")"
        prepared+=("$part")
        OMP_NUM_THREADS=2 beside stage "$part" "prepare-$number" \
            train prepare --base "$base" --data "$data" --parts "$number-$number" --only-parts "${limit[@]}"
    done
    OMP_NUM_THREADS=2 beside stage "$out/sets.pt" prepare-sets \
        train prepare --base "$base" --data "$data" --only-sets "${limit[@]}"
    for shard in $(seq 0 $((shards - 1))); do
        teach() {
            when "$out/sets.pt" -- stage "$out/taught$1.done" "teach-$1" \
                on_gpu "$1" train teach --teacher "$teacher" --parts "$parts" --shard "$1" --shards "$shards" &&
                touch "$out/taught$1.done"
        }
        beside teach "$shard"
        OMP_NUM_THREADS=2 beside when "$out/sets.teacher.pt" -- stage "$out/reading$shard.pt" "reading-$shard" \
            on_gpu "$shard" train reading --base "$base" --reading "$([[ -z "${limit[*]}" ]] && echo 60000 || echo 100)" \
            --shard "$shard"
        ask() {
            when "$out/sets.pt" "${prepared[@]}" -- stage "$out/asked$1.pt" "questions-$1" \
                on_gpu "$1" train questions --base "$base" --parts "$parts" --minutes "$minutes" \
                --shard "$1" --shards "$shards" "${asking[@]}" &&
            when "$out/taught$1.done" -- stage "$out/asked$1.teacher.pt" "teach-asked-$1" \
                on_gpu "$1" train teach --teacher "$teacher" --parts "$parts" --shard "$1" --shards "$shards" --asked
        }
        beside ask "$shard"
        [[ -z "$reader" ]] || beside when "$out/asked$shard.pt" -- stage "$out/answers$shard.pt" "answers-$shard" \
            on_gpu "$shard" train answers --base "$base" --initial "$reader" --shard "$shard" "${checking[@]}"
    done
    if ((spans > 0)); then
        beside when "${prepared[@]}" -- stage "$out/spans.pt" spans \
            train spans --base "$base" --parts "$parts" --passages "$spans"
        beside when "$out/spans.pt" "$out/taught0.done" -- stage "$out/spans.teacher.pt" teach-spans \
            on_gpu 0 train teach --teacher "$teacher" --parts "$parts" --shards "$shards" --spans
    fi
    words() { "$python" scripts/real_lexical.py "$1" --work "$out" "${@:2}"; }
    if [[ -n "$with_words" ]]; then
        OMP_NUM_THREADS=4 beside when "$out/sets.pt" "${prepared[@]}" -- stage "$out/words.pt" words \
            words words --parts "$parts"
        asked=("$out/words.pt")
        for shard in $(seq 0 $((shards - 1))); do asked+=("$out/asked$shard.pt"); done
        beside when "${asked[@]}" -- stage "$out/asked$((shards - 1)).words.pt" words-asked words asked --shards "$shards"
    fi
    OMP_NUM_THREADS=4 beside when "$out/sets.pt" "${prepared[@]}" -- stage "$out/lexical.npz" bm25 \
        words rank --parts "$parts"
    together
    say "data: $((SECONDS - begun)) s"
    exit
fi

name="${1:-}"
[[ -n "$name" ]] || die "$what needs a name"
shift
[[ -e "$out/parts" ]] || die "$out holds no data; make it with: make_real.sh data"
base="$(<"$out/base")" parts="$(<"$out/parts")"
if [[ "$what" == train ]]; then
    say "training; OUT/$name.curve.jsonl grows meanwhile"
    stage "$out/$name.done" "train-$name" "${launch[@]}" scripts/train_real.py routers --base "$base" --work "$out" \
        --name "$name" --shards "$shards" "$@"
    tail -n 1 "$out/$name.curve.jsonl"
elif [[ "$what" == finish ]]; then
    stage "$out/$name.pt" "finish-$name" "$python" scripts/real_corpus.py --base "$base" --work "$out" --name "$name" \
        --shards "$shards" "$@"
    grep recall "$out/$name.curve.jsonl" | tail -n 1
else
    results="$out/$name"
    mkdir -p "$results"
    of=(--base "$base" --work "$out" --name "$name")
    beside stage "$results/adapter" "adapter-$name" \
        "$python" scripts/train_real.py adapter "${of[@]}" --out "$results/adapter"
    stage "$results/search.json" "search-$name" \
        "${launch[@]}" scripts/eval_real.py search "${of[@]}" --out "$results" --parts "$parts"
    stage "$results/best.npz" "fuse-$name" "$python" scripts/eval_real.py fuse --work "$out" --out "$results" \
        --parts "$parts"
    stage "$results/answers.json" "read-$name" \
        "${launch[@]}" scripts/eval_real.py read "${of[@]}" --out "$results" --parts "$parts" "$@"
    stage "$results/report.md" "report-$name" "$python" scripts/eval_real.py report --work "$out" --out "$results"
    together
    cat "$results/report.md"
fi
