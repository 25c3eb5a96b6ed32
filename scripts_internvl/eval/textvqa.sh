#!/bin/sh
# TextVQA, 5,000 questions of the validation split: sh scripts_internvl/eval/textvqa.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/textvqa
need "$D/llava_textvqa_val_v051_ocr.jsonl" "$D/train_images" "$D/TextVQA_0.5.1_val.json"
answer model_vqa_loader "$D/llava_textvqa_val_v051_ocr.jsonl" "$D/train_images" "$D/answers/$NAME.jsonl" "$@"
step "$PYTHON" -m llava.eval.eval_textvqa \
    --annotation-file "$D/TextVQA_0.5.1_val.json" \
    --result-file "$D/answers/$NAME.jsonl"
