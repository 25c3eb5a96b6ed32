"""Answer the question file of ScienceQA.

    python -m llava.eval.model_vqa_science --model-path CHECKPOINT --image-folder images/test \\
        --question-file llava_test_CQM-A.json --answers-file answers/NAME.jsonl --single-pred-prompt --temperature 0
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from llava.eval.benchmarks.science_qa import read_questions
from llava.eval.model_vqa_loader import answer_file, build_parser
from llava.utils import guarded

FOLLOW_UP = " ###\nANSWER:"


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser(__doc__, "tables/question.json", max_new_tokens=1024)
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter only")
    parser.add_argument("--answer-prompter", action="store_true", help="ask again, with the answer, for its letter")
    args = parser.parse_args(argv)
    read = functools.partial(read_questions, single_pred_prompt=args.single_pred_prompt)
    return answer_file(args, read, follow_up=FOLLOW_UP if args.answer_prompter else None)


if __name__ == "__main__":
    raise SystemExit(main())
