#!/bin/sh
# LLaVA-1.5, 13B, with LoRA on a task: pass --data_path and --image_folder of its records.
set -eu
cd "$(dirname "$0")/../.."
OUTPUT_DIR=${OUTPUT_DIR:-work_dirs/llava_v1_5_finetune_task_lora}
. scripts/_llava.sh

use_zero 3
use_batch 16 128
lora_v1_5 \
    --model_name_or_path liuhaotian/llava-v1.5-13b \
    --vision_tower openai/clip-vit-large-patch14-336 \
    --pretrain_mm_mlp_adapter "" \
    "$@"
