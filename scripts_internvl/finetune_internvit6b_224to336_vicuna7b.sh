#!/bin/sh
# Stage 2 of InternVL-Chat 336 px, 7B: full, 665K conversations, 8 GPUs x 16 = 128.
set -eu
cd "$(dirname "$0")/.."
. scripts_internvl/_common.sh

use_zero 3
use_batch 16 128
finetune \
    --model_name_or_path ./pretrained/vicuna-7b-v1.5 \
    --vision_tower "$(tower intern_vit_6b_224px InternViT-6B-224px)" \
    --mm_vision_select_layer -4 \
    "$@"
