#!/bin/sh
# Stage 2 of the first LLaVA: full, 80K instructions, 8 GPUs x 16 = 128.
set -eu
cd "$(dirname "$0")/.."
. scripts/_llava.sh

use_zero 2
use_batch 16 128
need_model
original_finetune \
    --data_path ./playground/data/llava_instruct_80k.json \
    "$@"
