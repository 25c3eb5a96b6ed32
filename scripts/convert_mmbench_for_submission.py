"""Convert MMBench answers to the table of its evaluation server, see `llava/eval/benchmarks/mmbench.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks.mmbench import convert
from llava.eval.program import file_flag, flag, program

FLAGS = map(file_flag, ("--annotation-file", "--result-dir", "--upload-dir"))
main = program(__doc__, convert, *FLAGS, flag("--experiment", required=True))

if __name__ == "__main__":
    sys.exit(main())
