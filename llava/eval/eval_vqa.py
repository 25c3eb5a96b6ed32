"""Score VQAv2 or VizWiz answers to a split with public labels, by the official soft accuracy."""

from llava.eval.benchmarks import vqa
from llava.eval.program import file_flag, program

main = program(__doc__, vqa.evaluate, file_flag("--annotation-file"), file_flag("--result-file"))

if __name__ == "__main__":
    raise SystemExit(main())
