"""Convert MM-Vet answers to the format of its grading notebook, see `llava/eval/benchmarks/judged.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks.judged import convert
from llava.eval.program import file_flag, program

main = program(__doc__, convert, file_flag("--src"), file_flag("--dst"))

if __name__ == "__main__":
    sys.exit(main())
