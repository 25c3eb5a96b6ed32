#!/bin/sh
# Stage 2 of LLaVA-1.5 with LoRA, 13B: 665K instructions, 8 GPUs x 16 = 128.
set -eu
cd "$(dirname "$0")/../.."
OUTPUT_DIR=${OUTPUT_DIR:-work_dirs/llava_v1_5_finetune_lora}
. scripts/_llava.sh

use_zero 3
use_batch 16 128
lora_v1_5 \
    --model_name_or_path lmsys/vicuna-13b-v1.5 \
    --vision_tower openai/clip-vit-large-patch14-336 \
    --pretrain_mm_mlp_adapter ./work_dirs/llava_v1_5_pretrain/mm_projector.bin \
    "$@"
