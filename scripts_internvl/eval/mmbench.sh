#!/bin/sh
# MMBench, 4,377 rows of the dev split: sh scripts_internvl/eval/mmbench.sh CHECKPOINT
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh
. scripts_internvl/eval/_mmbench.sh

# The test split mmbench_test_en_20231003 is scored by the server only.
mmbench mmbench "${SPLIT:-mmbench_dev_20230712}" "$@"
