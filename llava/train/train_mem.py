"""`llava.train.train` under the name that the published recipes use; attention is chosen in the same way."""

from __future__ import annotations

import sys

from llava.train.train import main

if __name__ == "__main__":
    sys.exit(main())
