"""Score a model and GPT-4 together on ScienceQA (spec/eval.md §4.5)."""

import sys

from llava.eval.benchmarks.science_qa import OPTIONS, letters
from llava.eval.benchmarks.science_qa_ensemble import ensemble
from llava.eval.program import file_flag, flag, program

_CHOICE = (flag("--split", default="test"), flag("--options", type=letters, default=OPTIONS))
main = program(__doc__, ensemble, *map(file_flag, ("--base-dir", "--gpt4-result", "--our-result")), *_CHOICE)

if __name__ == "__main__":
    sys.exit(main())
