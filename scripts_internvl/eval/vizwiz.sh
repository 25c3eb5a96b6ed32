#!/bin/sh
# VizWiz, 8,000 questions of the test split, scored by the official server: sh scripts_internvl/eval/vizwiz.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/vizwiz
need "$D/llava_test.jsonl" "$D/test"
answer model_vqa_loader "$D/llava_test.jsonl" "$D/test" "$D/answers/$NAME.jsonl" "$@"
step "$PYTHON" scripts/convert_vizwiz_for_submission.py \
    --annotation-file "$D/llava_test.jsonl" \
    --result-file "$D/answers/$NAME.jsonl" \
    --result-upload-file "$D/answers_upload/$NAME.json"
