#!/bin/sh
# POPE, 8,910 yes/no questions: sh scripts_internvl/eval/pope.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/pope
need "$D/llava_pope_test.jsonl" "$D/val2014" "$D/coco"
answer model_vqa_loader "$D/llava_pope_test.jsonl" "$D/val2014" "$D/answers/$NAME.jsonl" "$@"
step "$PYTHON" llava/eval/eval_pope.py \
    --annotation-dir "$D/coco" \
    --question-file "$D/llava_pope_test.jsonl" \
    --result-file "$D/answers/$NAME.jsonl"
