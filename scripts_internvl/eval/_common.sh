# shellcheck shell=sh
# What the benchmarks of this folder share; each sources it from the project's root, then calls in turn:
#
#   need FILE...                             stop before the model is loaded when one is missing
#   answer RUNNER QUESTIONS IMAGES ANSWERS FLAG...        one process; goes on where it was interrupted
#   answer_sharded RUNNER QUESTIONS IMAGES FOLDER FLAG... one process for each GPU of CUDA_VISIBLE_DEVICES, default one;
#                                            FOLDER/merge.jsonl has all answers in question order
#   step WORD...                             a scorer or converter
#
# The first argument of a benchmark is the checkpoint, the others go to the runner (--device cpu, --model-base …).
# Environment: EVAL_DATA (folder of the benchmarks), CONV_MODE, PYTHON. LLAVA_DRY_RUN=1 prints the commands only.
set -eu
. scripts_internvl/_common.sh

[ $# -ge 1 ] || fail "no checkpoint given; usage: sh $0 CHECKPOINT [FLAG ...]"
CHECKPOINT=${1%/}
shift
NAME=$(basename "$CHECKPOINT")
case $NAME in checkpoint-*) NAME=$(basename "$(dirname "$CHECKPOINT")")_$NAME ;; esac
EVAL_DATA=${EVAL_DATA:-./playground/data/eval}
CONV_MODE=${CONV_MODE:-vicuna_v1}

need() {
    [ -z "${LLAVA_DRY_RUN:-}" ] || return 0
    for file in "$@"; do
        [ -e "$file" ] || fail "$file is missing; docs/Evaluation.md says where it comes from."
    done
}

step() {
    print_command "$@"
    [ -n "${LLAVA_DRY_RUN:-}" ] || "$@"
}

answer() {
    runner=$1 questions=$2 images=$3 answers=$4
    shift 4
    step "$PYTHON" -m "llava.eval.$runner" \
        --model-path "$CHECKPOINT" \
        --question-file "$questions" \
        --image-folder "$images" \
        --answers-file "$answers" \
        --temperature 0 \
        --conv-mode "$CONV_MODE" \
        "$@"
}

answer_sharded() {
    runner=$1 questions=$2 images=$3 folder=$4
    shift 4
    list=$(echo "${CUDA_VISIBLE_DEVICES:-}" | tr ',' ' ')
    [ -n "$list" ] || list=-
    # shellcheck disable=SC2086 # one word for each GPU
    count=$(printf '%s\n' $list | wc -l | tr -d ' ')
    index=0 pids='' parts=''
    for gpu in $list; do
        part=$folder/${count}_$index.jsonl
        (
            [ "$gpu" = - ] || export CUDA_VISIBLE_DEVICES="$gpu"
            answer "$runner" "$questions" "$images" "$part" --num-chunks "$count" --chunk-idx "$index" "$@"
        ) &
        pids="$pids $!" parts="$parts $index"
        index=$((index + 1))
    done
    failed=''
    index=0
    for pid in $pids; do
        wait "$pid" || failed="$failed $index"
        index=$((index + 1))
    done
    [ -z "$failed" ] || fail "shard(s)$failed of $count failed (see above); run the same command again, it goes on there."
    merge
}

# Joins the shards in question order, once all their lines are there.
merge() {
    [ -z "${LLAVA_DRY_RUN:-}" ] || return 0
    for index in $parts; do cat "$folder/${count}_$index.jsonl"; done >"$folder/merge.tmp"
    wanted=$(grep -c '[^[:space:]]' "$questions") found=$(wc -l <"$folder/merge.tmp" | tr -d ' ')
    [ "$wanted" -eq "$found" ] || fail "$folder has $found answers to $wanted questions; run the same command again."
    mv "$folder/merge.tmp" "$folder/merge.jsonl"
}
