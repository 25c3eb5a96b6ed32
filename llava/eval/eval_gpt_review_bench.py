"""Compare two answers about images described by captions (LLaVA-Bench); see `llava.eval.judging.reviews`."""

from llava.eval.judging.reviews import BENCH, review_program

main = review_program(__doc__, BENCH, "gpt-4-0314")

if __name__ == "__main__":
    raise SystemExit(main())
