"""Score SEED-Bench answers and write the submission, see `llava/eval/benchmarks/seed.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks.seed import evaluate
from llava.eval.program import file_flag, program

FLAGS = map(file_flag, ("--annotation-file", "--result-file", "--result-upload-file"))
main = program(__doc__, evaluate, *FLAGS)

if __name__ == "__main__":
    sys.exit(main())
