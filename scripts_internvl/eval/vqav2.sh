#!/bin/sh
# VQAv2, 107,394 questions of test-dev, scored by the official server: sh scripts_internvl/eval/vqav2.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/vqav2
SPLIT=llava_vqav2_mscoco_test-dev2015
need "$D/$SPLIT.jsonl" "$D/llava_vqav2_mscoco_test2015.jsonl" "$D/test2015"
answer_sharded model_vqa_loader "$D/$SPLIT.jsonl" "$D/test2015" "$D/answers/$SPLIT/$NAME" "$@"
step "$PYTHON" scripts/convert_vqav2_for_submission.py --dir "$D" --split "$SPLIT" --ckpt "$NAME"
