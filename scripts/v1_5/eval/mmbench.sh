#!/bin/sh
# MMBench of LLaVA-1.5-13B.
set -eu
cd "$(dirname "$0")/../../.."
. scripts/v1_5/eval/_common.sh
