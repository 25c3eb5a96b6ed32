#!/bin/sh
# Stage 1 of the quickstart: nano InternViT and SmolLM2-135M on the CPU; projector only, captions of easy-VQA.
set -eu
cd "$(dirname "$0")/.."
GPUS=${GPUS:-0}
. scripts_internvl/_common.sh

# Captions use the chat template: SmolLM2 has no start token, so with --version plain the image in front would become the
# attention sink, with unstable gradients and a poorly trained projector.
use_zero 2
use_batch 32 32
pretrain \
    --model_name_or_path ./pretrained/smollm2-135m-instruct \
    --version Hermes-2 \
    --image_aspect_ratio pad \
    --vision_tower ./pretrained/nano-internvit \
    --mm_vision_image_size 64 \
    --mm_vision_select_layer -1 \
    --data_path ./playground/data/easy_vqa/pretrain.json \
    --image_folder ./playground/data/easy_vqa \
    --max_steps 80 \
    --save_steps 40 \
    --save_total_limit 1 \
    --learning_rate 4e-3 \
    --adam_beta2 0.95 \
    --logging_steps 10 \
    --model_max_length 512 \
    --gradient_checkpointing False \
    --attn_implementation eager \
    --dataloader_num_workers 0 \
    --report_to none \
    "$@"
