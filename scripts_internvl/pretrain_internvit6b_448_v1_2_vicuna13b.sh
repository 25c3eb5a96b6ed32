#!/bin/sh
# Stage 1 with the 45-layer V1-2 tower at 448 px, 13B: projector only, 8 GPUs x 16 x 2 steps = 256.
set -eu
cd "$(dirname "$0")/.."
. scripts_internvl/_common.sh

use_zero 1
use_batch 16 256
pretrain \
    --model_name_or_path ./pretrained/vicuna-13b-v1.5 \
    --vision_tower ./pretrained/InternViT-6B-448px-V1-2 \
    --mm_vision_select_layer -1 \
    --dataloader_num_workers 32 \
    "$@"
