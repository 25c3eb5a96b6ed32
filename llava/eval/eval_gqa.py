"""Score GQA answers with `testdev_balanced_questions.json`; the official tool is not needed."""

from llava.eval.benchmarks import gqa
from llava.eval.program import file_flag, program

main = program(__doc__, gqa.evaluate, file_flag("--question-file"), file_flag("--result-file"))

if __name__ == "__main__":
    raise SystemExit(main())
