"""Convert VizWiz answers to the format of its evaluation server, see `llava/eval/benchmarks/vqa.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.benchmarks.vqa import submit_vizwiz
from llava.eval.program import file_flag, program

FLAGS = map(file_flag, ("--annotation-file", "--result-file", "--result-upload-file"))
main = program(__doc__, submit_vizwiz, *FLAGS)

if __name__ == "__main__":
    sys.exit(main())
