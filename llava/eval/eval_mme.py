"""Score MME: official task files (`--results-dir`), or answers (`--annotation-dir` and `--result-file`)."""

from llava.eval.benchmarks import mme
from llava.eval.program import file_flag, program

_NAMES = ("--results-dir", "--annotation-dir", "--result-file", "--output-dir")
main = program(__doc__, mme.evaluate, *(file_flag(name, required=False) for name in _NAMES))

if __name__ == "__main__":
    raise SystemExit(main())
