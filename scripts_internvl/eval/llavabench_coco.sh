#!/bin/sh
# LLaVA-Bench on COCO, 90 questions, reviewed by a judge: sh scripts_internvl/eval/llavabench_coco.sh CHECKPOINT
# The judge is OpenAI's API (OPENAI_API_KEY) or a compatible server (OPENAI_BASE_URL).
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/../coco2014_val_qa_eval
need "$D/qa90_questions.jsonl" "$D/val2014" "$D/caps_boxes_coco2014_val_80.jsonl" "$D/qa90_gpt4_answer.jsonl"
need_judge
answer model_vqa "$D/qa90_questions.jsonl" "$D/val2014" "$D/answers/$NAME.jsonl" "$@"
step "$PYTHON" llava/eval/eval_gpt_review_visual.py \
    --question "$D/qa90_questions.jsonl" \
    --context "$D/caps_boxes_coco2014_val_80.jsonl" \
    --rule llava/eval/table/rule.json \
    --answer-list "$D/qa90_gpt4_answer.jsonl" "$D/answers/$NAME.jsonl" \
    --output "$D/reviews/$NAME.jsonl"
step "$PYTHON" llava/eval/summarize_gpt_review.py -f "$D/reviews/$NAME.jsonl"
