"""Merge a LoRA adapter into its base model and verify the result, see `llava/model/merge.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.model.merge import main

if __name__ == "__main__":
    sys.exit(main())
