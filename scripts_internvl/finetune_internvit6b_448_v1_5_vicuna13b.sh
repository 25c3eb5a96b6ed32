#!/bin/sh
# Stage 2 with the 45-layer V1-5 tower at 448 px, 13B: full, 8 GPUs x 16 = 128.
set -eu
cd "$(dirname "$0")/.."
. scripts_internvl/_common.sh

use_zero 3
use_batch 16 128
finetune \
    --model_name_or_path ./pretrained/vicuna-13b-v1.5 \
    --vision_tower ./pretrained/InternViT-6B-448px-V1-5 \
    --mm_vision_select_layer -1 \
    --save_steps 100 \
    --dataloader_num_workers 32 \
    "$@"
