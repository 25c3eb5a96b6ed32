#!/bin/sh
# Stage 2 on your own mixture (scripts_internvl/meta/custom_data.json), started by srun: 128 GPUs x 2 x 2 steps = 512.
set -eu
cd "$(dirname "$0")/.."
PARTITION=${PARTITION:-INTERN2}
GPUS=${GPUS:-128}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
CPUS_PER_TASK=${CPUS_PER_TASK:-10}
QUOTA_TYPE=${QUOTA_TYPE-reserved}
. scripts_internvl/_common.sh

use_zero 1
use_batch 2 512
finetune_with_slurm \
    --model_name_or_path ./pretrained/vicuna-13b-v1.5 \
    --vision_tower "$(tower intern_vit_6b_224px InternViT-6B-224px)" \
    --mm_vision_select_layer -4 \
    --pretrain_mm_mlp_adapter ./work_dirs/pretrain_internvit6b_224to336_vicuna13b/mm_projector.bin \
    --dataloader_num_workers 2 \
    "$@"
