#!/bin/sh
# Stage 2 of the quickstart: language model and projector, conversations of easy-VQA's training questions.
set -eu
cd "$(dirname "$0")/.."
GPUS=${GPUS:-0}
. scripts_internvl/_common.sh

use_zero 3
use_batch 8 8
finetune \
    --model_name_or_path ./pretrained/smollm2-135m-instruct \
    --version Hermes-2 \
    --vision_tower ./pretrained/nano-internvit \
    --mm_vision_image_size 64 \
    --mm_vision_select_layer -1 \
    --data_path ./playground/data/easy_vqa/finetune.json \
    --image_folder ./playground/data/easy_vqa \
    --max_steps 260 \
    --save_steps 65 \
    --save_total_limit 1 \
    --learning_rate 3e-4 \
    --logging_steps 10 \
    --model_max_length 512 \
    --group_by_modality_length False \
    --gradient_checkpointing False \
    --optim adamw_torch_fused \
    --adam_beta2 0.98 \
    --attn_implementation eager \
    --dataloader_num_workers 0 \
    --report_to none \
    "$@"
