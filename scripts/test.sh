#!/bin/sh
# All checks of CI: style, types, tests, coverage; `--fast` skips slow tests and coverage.
set -eu
cd "$(dirname "$0")/.."
. scripts/_env.sh

case ${1:-} in
'' | --fast) ;;
*) llava_fail "Unknown argument $1; usage: sh scripts/test.sh [--fast]" ;;
esac
llava_need_compiler
llava_venv train quant serve export playground dev docs
sh scripts/lint.sh
# Two processes run the tests, those of a file in the same one, so that they share its servers and checkpoints.
if [ "${1:-}" = --fast ]; then
    exec python -m pytest -q -n 2 --dist loadfile -m 'not slow and not golden'
fi
rm -f .coverage .coverage.*
python -m coverage run -m pytest -n 2 --dist loadfile --durations=15
python -m coverage combine -q
python -m coverage report
