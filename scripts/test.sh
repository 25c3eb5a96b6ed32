#!/bin/sh
# All checks of CI: style, types, tests; `--fast` skips slow tests, `--coverage` also measures coverage.
set -eu
cd "$(dirname "$0")/.."
. scripts/_env.sh

case ${1:-} in
'' | --fast | --coverage) ;;
*) llava_fail "Unknown argument $1; usage: sh scripts/test.sh [--fast | --coverage]" ;;
esac
llava_need_compiler
llava_venv train quant serve playground dev docs
sh scripts/lint.sh
# Two processes run the tests, those of a file in the same one, so that they share its servers and checkpoints.
if [ "${1:-}" = --fast ]; then
    exec python -m pytest -q -n 2 --dist loadfile -m 'not slow and not golden'
fi
# Tracing costs a third of the time.
if [ "${1:-}" = '' ]; then
    exec python -m pytest -n 2 --dist loadfile --durations=30
fi
rm -f .coverage .coverage.*
python -m coverage run -m pytest -n 2 --dist loadfile
python -m coverage combine -q
python -m coverage report
