#!/bin/sh
# Style and types: ruff, mypy --strict, shellcheck, dash -n; `--fix` applies the fixes of ruff.
set -eu
cd "$(dirname "$0")/.."
. scripts/_env.sh

llava_venv train dev
if [ "${1:-}" = --fix ]; then
    ruff check --fix .
    ruff format .
fi
ruff check .
ruff format --check .
mypy
python scripts/file_tree.py --check
find . -name '.?*' ! -name .ci -prune -o \( -name '*.sh' -o -path ./.ci/run \) -type f -print | while read -r script; do
    shellcheck --external-sources "$script"
    if command -v dash >/dev/null; then
        dash -n "$script"
    fi
done
