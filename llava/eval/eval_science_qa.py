"""Score ScienceQA answers: `--base-dir` has `pid_splits.json` and `problems.json`."""

from llava.eval.benchmarks.science_qa import OPTIONS, evaluate, parse_options
from llava.eval.program import file_flag, flag, program

_OUTPUTS = (file_flag("--output-file", required=False), file_flag("--output-result", required=False))
_CHOICE = (flag("--split", default="test"), flag("--options", type=parse_options, default=OPTIONS))
main = program(__doc__, evaluate, file_flag("--base-dir"), file_flag("--result-file"), *_OUTPUTS, *_CHOICE)

if __name__ == "__main__":
    raise SystemExit(main())
