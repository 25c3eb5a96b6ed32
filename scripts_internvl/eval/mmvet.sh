#!/bin/sh
# MM-Vet, 218 questions, graded by the official notebook: sh scripts_internvl/eval/mmvet.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/mm-vet
need "$D/llava-mm-vet.jsonl" "$D/images"
answer model_vqa "$D/llava-mm-vet.jsonl" "$D/images" "$D/answers/$NAME.jsonl" "$@"
step "$PYTHON" scripts/convert_mmvet_for_eval.py --src "$D/answers/$NAME.jsonl" --dst "$D/results/$NAME.json"
