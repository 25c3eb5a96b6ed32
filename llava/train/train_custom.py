"""`train` for a mixture of data sets: `torchrun ... llava/train/train_custom.py --meta_path mixture.json ...`.

The mixture (spec/train.md §3.2) is read by `llava.data.mixture`; `--version` is honoured.
"""

from __future__ import annotations

import sys

from llava.train.train import main

if __name__ == "__main__":
    sys.exit(main())
