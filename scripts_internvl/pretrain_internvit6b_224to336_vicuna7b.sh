#!/bin/sh
# Stage 1 of InternVL-Chat 336 px, 7B: projector only, 558K captions, 8 GPUs x 32 = 256.
set -eu
cd "$(dirname "$0")/.."
. scripts_internvl/_common.sh

use_zero 2
use_batch 32 256
pretrain \
    --model_name_or_path ./pretrained/vicuna-7b-v1.5 \
    --vision_tower "$(tower intern_vit_6b_224px InternViT-6B-224px)" \
    --mm_vision_select_layer -4 \
    "$@"
