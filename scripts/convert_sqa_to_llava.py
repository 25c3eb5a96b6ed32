"""Convert ScienceQA to conversations, JSON Lines or a question file, see `llava/eval/scienceqa_prompts.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.program import file_flag, flag, program
from llava.eval.scienceqa_prompts import FORMATS, TASKS, convert

TASK, BASE, SPLIT = flag("task", choices=TASKS), file_flag("--base-dir"), flag("--split", required=True)
main = program(__doc__, convert, TASK, BASE, SPLIT, flag("--prompt-format", choices=FORMATS, metavar="FORMAT"))

if __name__ == "__main__":
    sys.exit(main())
