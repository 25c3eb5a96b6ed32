#!/bin/sh
# MMBench in Chinese, 4,329 rows of the dev split: sh scripts_internvl/eval/mmbench_cn.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh
. scripts_internvl/eval/_mmbench.sh

mmbench mmbench_cn "${SPLIT:-mmbench_dev_cn_20231003}" --lang cn "$@"
