"""Summarise judged reviews per category: `-d FOLDER` or `-f FILE …` (spec/eval.md §5)."""

import sys
from pathlib import Path

from llava.eval.judging.reviews import summarize
from llava.eval.program import file_flag, flag, program

_WHICH = (
    flag("-v", "--version"),
    flag("-s", "--select", nargs="*"),
    flag("-f", "--files", nargs="*", type=Path, default=[]),
)
_IGNORE = flag("-i", "--ignore", nargs="*", type=int, default=[])
main = program(__doc__, summarize, file_flag("-d", "--dir", required=False), *_WHICH, _IGNORE)

if __name__ == "__main__":
    sys.exit(main())
