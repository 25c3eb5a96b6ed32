"""Score ScienceQA where GPT-4 was asked again about disagreements (spec/eval.md §4.5)."""

import sys

from llava.eval.benchmarks.science_qa import OPTIONS, letters
from llava.eval.benchmarks.science_qa_ensemble import requery
from llava.eval.program import file_flag, flag, program

_FILES = map(file_flag, ("--base-dir", "--gpt4-result", "--our-result", "--requery-result", "--output-result"))
_CHOICE = (flag("--split", default="test"), flag("--options", type=letters, default=OPTIONS))
main = program(__doc__, requery, *_FILES, *_CHOICE)

if __name__ == "__main__":
    sys.exit(main())
