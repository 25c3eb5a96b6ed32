#!/bin/sh
# GQA, 12,578 questions of testdev-balanced: sh scripts_internvl/eval/gqa.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/gqa
SPLIT=llava_gqa_testdev_balanced
need "$D/$SPLIT.jsonl" "$D/data/images" "$D/data/testdev_balanced_questions.json"
answer_sharded model_vqa_loader "$D/$SPLIT.jsonl" "$D/data/images" "$D/answers/$SPLIT/$NAME" "$@"
step "$PYTHON" scripts/convert_gqa_for_eval.py \
    --src "$D/answers/$SPLIT/$NAME/merge.jsonl" \
    --dst "$D/answers/$SPLIT/$NAME/testdev_balanced_predictions.json"
step "$PYTHON" llava/eval/eval_gqa.py \
    --question-file "$D/data/testdev_balanced_questions.json" \
    --result-file "$D/answers/$SPLIT/$NAME/merge.jsonl"
