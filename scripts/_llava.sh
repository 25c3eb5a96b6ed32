# shellcheck shell=sh
# Common part of the recipes of the original LLaVA, which source it from the repository root.
#
#   original_pretrain FLAG...  stage 1 of the first LLaVA: a linear projector on ./checkpoints/$MODEL_VERSION
#   original_finetune FLAG...  stage 2 of the first LLaVA: images of COCO, template $PROMPT_VERSION
#   llava STAGE FLAG...        a stage with the flags common to all versions
#   lora_v1_5 FLAG...          stage 2 of LLaVA-1.5 with LoRA, the projector at a rate of its own
#
# Environment as in scripts_internvl/_common.sh, and MODEL_VERSION and PROMPT_VERSION, which are required.
OUTPUT_DIR=${OUTPUT_DIR:-work_dirs/llava_$(basename "$0" .sh)}
. scripts_internvl/_common.sh

llava() {
    stage=$1
    shift
    "$stage" \
        --mm_vision_select_layer -2 \
        --save_steps 50000 \
        --save_total_limit 1 \
        --report_to wandb \
        "$@"
}

lora_v1_5() {
    llava finetune \
        --lora_enable True \
        --lora_r 128 \
        --lora_alpha 256 \
        --learning_rate 2e-4 \
        --mm_projector_lr 2e-5 \
        "$@"
}

stage_2() {
    launcher=${launcher:-torch_launcher}
    train --learning_rate 2e-5 "$@"
}

original() {
    stage=$1
    shift
    llava "$stage" \
        --model_name_or_path "./checkpoints/${MODEL_VERSION:-}" \
        --vision_tower openai/clip-vit-large-patch14 \
        --mm_projector_type linear \
        "$@"
}

need_model() {
    [ -n "${MODEL_VERSION:-}" ] || fail "MODEL_VERSION is not set; set it to a language model below ./checkpoints, for example MODEL_VERSION=vicuna-7b-v1.3."
}

original_pretrain() {
    need_model
    original pretrain \
        --learning_rate 2e-3 \
        --data_path ./playground/data/LLaVA-CC3M-Pretrain-595K/chat.json \
        --image_folder ./playground/data/LLaVA-CC3M-Pretrain-595K/images \
        --save_steps 24000 \
        "$@"
}

original_finetune() {
    [ -n "${PROMPT_VERSION:-}" ] || fail "PROMPT_VERSION is not set; set it to a template, for example PROMPT_VERSION=v1."
    original stage_2 \
        --version "$PROMPT_VERSION" \
        --image_folder ./playground/data/coco/train2017 \
        --pretrain_mm_mlp_adapter ./work_dirs/llava_pretrain/mm_projector.bin \
        "$@"
}
