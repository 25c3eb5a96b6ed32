"""Convert VQAv2 answers to the format of its evaluation server, see `llava/eval/benchmarks/vqa.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks.vqa import submit_vqav2
from llava.eval.program import file_flag, flag, program

FOLDER = file_flag("--dir", default=Path("./playground/data/eval/vqav2"))
main = program(__doc__, submit_vqav2, FOLDER, flag("--ckpt", required=True), flag("--split", required=True))

if __name__ == "__main__":
    sys.exit(main())
