# shellcheck shell=sh
# Benchmarks of LLaVA-1.5, run by scripts_internvl/eval: sh scripts/v1_5/eval/NAME.sh [FLAG ...]
#
# The checkpoint is liuhaotian/llava-v1.5-13b unless CHECKPOINT is set; flags are passed to the evaluation program.
set -eu
exec sh "scripts_internvl/eval/$(basename "$0")" "${CHECKPOINT:-liuhaotian/llava-v1.5-13b}" "$@"
