"""`python -m llava` is the console command `llava`."""

import sys

from llava.cli import main

if __name__ == "__main__":
    sys.exit(main())
