#!/bin/sh
# LLaVA-Bench in the wild, 60 questions, reviewed by a judge: sh scripts_internvl/eval/llavabench.sh CHECKPOINT
# The judge is OpenAI's API (OPENAI_API_KEY) or a compatible server (OPENAI_BASE_URL).
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh

D=$EVAL_DATA/llava-bench-in-the-wild
need "$D/questions.jsonl" "$D/images" "$D/context.jsonl" "$D/answers_gpt4.jsonl"
need_judge
answer model_vqa "$D/questions.jsonl" "$D/images" "$D/answers/$NAME.jsonl" "$@"
step "$PYTHON" llava/eval/eval_gpt_review_bench.py \
    --question "$D/questions.jsonl" \
    --context "$D/context.jsonl" \
    --rule llava/eval/table/rule.json \
    --answer-list "$D/answers_gpt4.jsonl" "$D/answers/$NAME.jsonl" \
    --output "$D/reviews/$NAME.jsonl"
step "$PYTHON" llava/eval/summarize_gpt_review.py -f "$D/reviews/$NAME.jsonl"
