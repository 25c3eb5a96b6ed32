#!/bin/sh
# MME, 2,374 yes/no questions: sh scripts_internvl/eval/mme.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/MME
need "$D/llava_mme.jsonl" "$D/MME_Benchmark_release_version"
answer model_vqa_loader "$D/llava_mme.jsonl" "$D/MME_Benchmark_release_version" "$D/answers/$NAME.jsonl" "$@"
step "$PYTHON" llava/eval/eval_mme.py \
    --annotation-dir "$D/MME_Benchmark_release_version" \
    --result-file "$D/answers/$NAME.jsonl" \
    --output-dir "$D/eval_tool/answers/$NAME"
