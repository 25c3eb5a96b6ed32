# shellcheck shell=sh
# The benchmarks of LLaVA-1.5, over scripts_internvl/eval: sh scripts/v1_5/eval/NAME.sh [FLAG ...]
#
# The published checkpoint is liuhaotian/llava-v1.5-13b; CHECKPOINT names another, flags go to the runner.
set -eu
exec sh "scripts_internvl/eval/$(basename "$0")" "${CHECKPOINT:-liuhaotian/llava-v1.5-13b}" "$@"
