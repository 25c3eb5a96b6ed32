#!/bin/sh
# ScienceQA, 4,241 questions: sh scripts_internvl/eval/sqa.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/scienceqa
need "$D/llava_test_CQM-A.json" "$D/images/test" "$D/pid_splits.json" "$D/problems.json"
answer model_vqa_science "$D/llava_test_CQM-A.json" "$D/images/test" "$D/answers/$NAME.jsonl" --single-pred-prompt "$@"
step "$PYTHON" llava/eval/eval_science_qa.py \
    --base-dir "$D" \
    --result-file "$D/answers/$NAME.jsonl" \
    --output-file "$D/answers/${NAME}_output.jsonl" \
    --output-result "$D/answers/${NAME}_result.json"
