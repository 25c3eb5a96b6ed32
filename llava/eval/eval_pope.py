"""Score POPE answers: `python llava/eval/eval_pope.py --annotation-dir … --question-file … --result-file …`."""

from llava.eval.benchmarks import pope
from llava.eval.program import file_flag, program

_FLAGS = map(file_flag, ("--annotation-dir", "--question-file", "--result-file"))
main = program(__doc__, pope.evaluate, *_FLAGS)

if __name__ == "__main__":
    raise SystemExit(main())
