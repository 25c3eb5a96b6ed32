"""Compare two answers about COCO images described by captions and boxes; see `llava.eval.judging.reviews`."""

from llava.eval.judging.reviews import VISUAL, review_program

main = review_program(__doc__, VISUAL, "gpt-4-0314")

if __name__ == "__main__":
    raise SystemExit(main())
