#!/bin/sh
# MMBench, 4,377 rows of the dev split: sh scripts_internvl/eval/mmbench.sh CHECKPOINT (spec/eval.md §4.8)
set -eu
cd "$(dirname "$0")/../.."
. scripts_internvl/eval/_common.sh
. scripts_internvl/eval/_mmbench.sh

# The test split, which only the server can score, is mmbench_test_en_20231003.
mmbench mmbench "${SPLIT:-mmbench_dev_20230712}" "$@"
