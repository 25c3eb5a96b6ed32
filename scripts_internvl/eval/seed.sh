#!/bin/sh
# SEED-Bench, 19,242 questions: sh scripts_internvl/eval/seed.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/seed_bench
need "$D/llava-seed-bench.jsonl" "$D/SEED-Bench.json" "$D/SEED-Bench-image" "$D/SEED-Bench-video-image"
answer_sharded model_vqa_loader "$D/llava-seed-bench.jsonl" "$D" "$D/answers/$NAME" "$@"
step "$PYTHON" scripts/convert_seed_for_submission.py \
    --annotation-file "$D/SEED-Bench.json" \
    --result-file "$D/answers/$NAME/merge.jsonl" \
    --result-upload-file "$D/answers_upload/$NAME.jsonl"
