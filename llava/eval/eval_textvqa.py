"""Score TextVQA answers: `python -m llava.eval.eval_textvqa --annotation-file … --result-file … | --result-dir …`."""

import sys

from llava.eval.benchmarks import textvqa
from llava.eval.program import file_flag, program

_ONE_OF = {"required": False}
_FILES = (file_flag("--annotation-file"), file_flag("--result-file", **_ONE_OF), file_flag("--result-dir", **_ONE_OF))
main = program(__doc__, textvqa.evaluate, *_FILES)

if __name__ == "__main__":
    sys.exit(main())
