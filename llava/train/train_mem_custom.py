"""`train_custom` for slurm: `srun python llava/train/train_mem_custom.py ...`, one task per GPU.

Detects slurm, Open MPI or torchrun by its environment, and joins the process group before parsing arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.train.dist_utils import detect_launcher, init_dist
from llava.train.train import main as train_main
from llava.utils import guarded


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    launcher = detect_launcher()
    if launcher:
        init_dist(launcher)
    return train_main(argv)


if __name__ == "__main__":
    sys.exit(main())
