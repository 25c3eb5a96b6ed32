#!/bin/sh
# Stage 1 of the first LLaVA: linear projector only, 595K captions, 8 GPUs x 16 = 128.
set -eu
cd "$(dirname "$0")/.."
. scripts/_llava.sh

use_zero 2
use_batch 16 128
original_pretrain \
    "$@"
