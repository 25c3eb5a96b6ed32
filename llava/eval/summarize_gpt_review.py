"""Summarize reviews per category: `-d FOLDER` or `-f FILE …`."""

from pathlib import Path

from llava.eval.judging.reviews import summarize
from llava.eval.program import file_flag, flag, program

_FLAGS = (
    file_flag("-d", "--dir", required=False),
    flag("-v", "--version", help="release of the judge: 0314 or 0613"),
    flag("-s", "--select", nargs="*", help="texts that must all occur in the file name"),
    flag("-f", "--files", nargs="*", type=Path, default=[]),
    flag("-i", "--ignore", nargs="*", type=int, default=[], help="ids of questions to exclude"),
)
main = program(__doc__, summarize, *_FLAGS)

if __name__ == "__main__":
    raise SystemExit(main())
