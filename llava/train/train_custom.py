"""`llava.train.train` for a mixture: `torchrun ... llava/train/train_custom.py --meta_path mixture.json ...`."""

from __future__ import annotations

import sys

from llava.train.train import main

if __name__ == "__main__":
    sys.exit(main())
