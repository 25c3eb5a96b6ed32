# shellcheck shell=sh
# Common part of the benchmarks of this folder, which source it from the repository root and call:
#
#   need FILE...                                          requires files before the model is loaded
#   answer RUNNER QUESTIONS IMAGES ANSWERS FLAG...        writes one file, in the order of the questions
#   answer_sharded RUNNER QUESTIONS IMAGES FOLDER FLAG... writes FOLDER/merge.jsonl
#   need_judge                                            requires the key or address of a judge
#   step WORD...                                          runs a scorer or converter
#
# With several GPUs in CUDA_VISIBLE_DEVICES, each runs one process, and shards are merged when all are complete. An
# interrupted run resumes, also with another number of GPUs.
#
# The first argument of a benchmark is the checkpoint; the others are passed to the runner (--device cpu, --model-base …).
# Environment: EVAL_DATA (folder of the benchmarks), CONV_MODE, PYTHON. LLAVA_DRY_RUN=1 only prints the commands.
set -eu
. scripts_internvl/_common.sh

[ $# -ge 1 ] || fail "A checkpoint is required; usage: sh $0 CHECKPOINT [FLAG ...]"
CHECKPOINT=${1%/}
shift
NAME=$(basename "$CHECKPOINT")
case $NAME in checkpoint-*) NAME=$(basename "$(dirname "$CHECKPOINT")")_$NAME ;; esac
EVAL_DATA=${EVAL_DATA:-./playground/data/eval}
CONV_MODE=${CONV_MODE:-vicuna_v1}

need() {
    [ -z "${LLAVA_DRY_RUN:-}" ] || return 0
    for file in "$@"; do
        [ -e "$file" ] || fail "$file is missing; see docs/Evaluation.md or run llava eval prepare."
    done
}

need_judge() {
    [ -n "${OPENAI_API_KEY:-}${OPENAI_BASE_URL:-}${LLAVA_DRY_RUN:-}" ] ||
        fail "A judge is required; set OPENAI_API_KEY, or OPENAI_BASE_URL for another server."
}

step() {
    printf '%s\n' "$(print_command "$@")" # in one write, since processes run in parallel
    [ -n "${LLAVA_DRY_RUN:-}" ] || ${in_place:+exec} "$@"
}

# The GPUs of CUDA_VISIBLE_DEVICES, separated by spaces; - if it is not set.
gpu_list() {
    list=$(echo "${CUDA_VISIBLE_DEVICES:-}" | tr ',' ' ')
    echo "${list:--}"
}

answer() {
    answers=$4
    # shellcheck disable=SC2046 # one word for each GPU
    if [ "$(printf '%s\n' $(gpu_list) | wc -l)" -eq 1 ]; then
        ask "$@"
        return
    fi
    target=$answers
    runner=$1 questions=$2 images=$3
    shift 4
    in_parts "$runner" "$questions" "$images" "${target%.jsonl}.shards" "$@"
}

answer_sharded() {
    target=$4/merge.jsonl
    in_parts "$@"
}

ask() {
    runner=$1 questions=$2 images=$3 file=$4
    shift 4
    step "$PYTHON" -m "llava.eval.$runner" \
        --model-path "$CHECKPOINT" \
        --question-file "$questions" \
        --image-folder "$images" \
        --answers-file "$file" \
        --temperature 0 \
        --conv-mode "$CONV_MODE" \
        "$@"
}

in_parts() {
    runner=$1 questions=$2 images=$3 folder=$4
    shift 4
    list=$(gpu_list)
    # shellcheck disable=SC2086 # one word for each GPU
    count=$(printf '%s\n' $list | wc -l | tr -d ' ')
    index=0 pids=''
    for gpu in $list; do
        (
            [ "$gpu" = - ] || export CUDA_VISIBLE_DEVICES="$gpu"
            # Ctrl-C does not reach background processes, so shards watch this shell.
            export LLAVA_EVAL_PARENT=$$
            in_place=1
            ask "$runner" "$questions" "$images" "$folder/${count}_$index.jsonl" \
                --num-chunks "$count" --chunk-idx "$index" "$@"
        ) &
        pids="$pids $!"
        index=$((index + 1))
    done
    failed=''
    index=0
    for pid in $pids; do
        wait "$pid" || failed="$failed $index"
        index=$((index + 1))
    done
    [ -z "$failed" ] || fail "Shard(s)$failed of $count failed (see above); run the same command again to resume."
    step "$PYTHON" -m llava.eval.run.shards --answers-dir "$folder" --num-chunks "$count" --output "$target"
}
