"""Have a judge compare two answers to questions without pictures: see `llava/eval/judging/reviews.py`."""

import sys

from llava.eval.judging.reviews import no_context, review_program

main = review_program(__doc__, no_context, "gpt-4", fallback=True)

if __name__ == "__main__":
    sys.exit(main())
