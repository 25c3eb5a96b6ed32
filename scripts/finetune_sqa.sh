#!/bin/sh
# Stage 2 of the first LLaVA on ScienceQA, 13B: full, twelve epochs, 8 GPUs x 16 = 128.
set -eu
cd "$(dirname "$0")/.."
. scripts/_llava.sh

use_zero 2
use_batch 16 128
original_finetune \
    --model_name_or_path lmsys/vicuna-13b-v1.3 \
    --data_path ./playground/data/ScienceQA/llava_train_QCM-LEA.json \
    --image_folder ./playground/data/ScienceQA/images/train \
    --num_train_epochs 12 \
    "$@"
