"""`train` under the name of the published recipes: `torchrun --nproc_per_node 8 llava/train/train_mem.py ...`.

FlashAttention-2 is taken wherever it can run (`--attn_implementation auto`, the default), as in `train`.
"""

from __future__ import annotations

import sys

from llava.train.train import main

if __name__ == "__main__":
    sys.exit(main())
