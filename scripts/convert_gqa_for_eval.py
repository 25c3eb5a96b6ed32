"""Convert GQA answers to the official predictions file, see `llava/eval/benchmarks/gqa.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks.gqa import convert
from llava.eval.program import file_flag, program

main = program(__doc__, convert, file_flag("--src"), file_flag("--dst"))

if __name__ == "__main__":
    sys.exit(main())
