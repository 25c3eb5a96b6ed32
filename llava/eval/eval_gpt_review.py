"""Compare two answers to text questions with a judge; see `llava.eval.judging.reviews`."""

from llava.eval.judging.reviews import TEXT, review_program

main = review_program(__doc__, TEXT, "gpt-4")

if __name__ == "__main__":
    raise SystemExit(main())
