"""Join the parts of a run that several processes answered: `--answers-dir FOLDER --num-chunks N --output FILE`.

A part that is missing, unfinished or altered is named, and nothing is written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llava.errors import ConfigError
from llava.eval.program import file_flag, flag, program
from llava.eval.run.shards import WHOLE, merge, shard_path


def join(answers_dir: Path, num_chunks: int, output: Path | None) -> str:
    """Merge `FOLDER/N_0.jsonl` … into one file (default: `FOLDER/merge.jsonl`)."""
    if num_chunks < 1:
        raise ConfigError(f"--num-chunks is {num_chunks}; it must be at least 1.")
    target = output or answers_dir / WHOLE
    count = merge([shard_path(answers_dir, index, num_chunks) for index in range(num_chunks)], target)
    return f"{target}: {count} answers from {num_chunks} shard(s)"


_CHUNKS = flag("--num-chunks", type=int, required=True)
main = program(__doc__, join, file_flag("--answers-dir"), _CHUNKS, file_flag("--output", required=False))

if __name__ == "__main__":
    sys.exit(main())
