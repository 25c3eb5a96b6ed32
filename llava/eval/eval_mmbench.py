"""Score MMBench answers with a table that has the answers: vanilla and circular accuracy."""

from llava.eval.benchmarks import mmbench
from llava.eval.program import file_flag, program

main = program(__doc__, mmbench.evaluate, file_flag("--annotation-file"), file_flag("--result-file"))

if __name__ == "__main__":
    raise SystemExit(main())
