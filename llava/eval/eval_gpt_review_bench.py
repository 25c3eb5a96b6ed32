"""Have a judge compare two answers about pictures known by captions (LLaVA-Bench); see `llava.eval.judging.reviews`."""

import sys

from llava.eval.judging.reviews import caption_context, review_program

main = review_program(__doc__, caption_context, "gpt-4-0314", "llava_bench_")

if __name__ == "__main__":
    sys.exit(main())
