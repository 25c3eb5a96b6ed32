#!/bin/sh
# Stage 1 of LLaVA-1.5, 13B: MLP projector only, 558K captions, 8 GPUs x 32 = 256.
set -eu
cd "$(dirname "$0")/../.."
OUTPUT_DIR=${OUTPUT_DIR:-work_dirs/llava_v1_5_pretrain}
. scripts/_llava.sh

use_zero 2
use_batch 32 256
llava pretrain \
    --model_name_or_path lmsys/vicuna-13b-v1.5 \
    --vision_tower openai/clip-vit-large-patch14-336 \
    --save_steps 24000 \
    "$@"
