"""Check a directory of weights or an annotation file, or compare training data with benchmarks.

    llava check pretrained/InternVL-Chat-ViT-6B-Vicuna-7B
    llava check playground/llava_v1_5_mix665k.json --images playground/data
    llava check playground/llava_v1_5_mix665k.json --image_folder playground/data --against pope mme

PATH is a checkpoint, adapter, language model or vision tower, or an annotation file or mixture.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from llava.data.annotations import SUFFIXES
from llava.utils import guarded

FILES: Final = "llava.data.check_records"
DIRECTORIES: Final = "llava.model.check"
CONTAMINATION: Final = "llava.eval.contamination"


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the check for the kind of path given, or print the help of all checks."""
    words = list(sys.argv[1:] if argv is None else argv)
    against = any(word.partition("=")[0] == "--against" for word in words)
    if not words or "-h" in words or "--help" in words:
        for module in (CONTAMINATION,) if against else (FILES, DIRECTORIES, CONTAMINATION):
            with suppress(SystemExit):  # raised by argparse after its help
                importlib.import_module(module).main(["--help"])
        return 0 if words else 2
    is_file = any(
        word.startswith("--images") if word.startswith("-") else word.lower().endswith(SUFFIXES) for word in words
    )
    module = CONTAMINATION if against else FILES if is_file else DIRECTORIES
    status: int = importlib.import_module(module).main(words)
    return status


if __name__ == "__main__":
    sys.exit(main())
