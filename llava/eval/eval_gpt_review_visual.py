"""Have a judge compare two answers about COCO images, given captions and boxes; see `llava.eval.judging.reviews`."""

import sys

from llava.eval.judging.reviews import box_context, review_program

main = review_program(__doc__, box_context, "gpt-4-0314")

if __name__ == "__main__":
    sys.exit(main())
