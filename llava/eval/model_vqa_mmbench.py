"""Answer an MMBench table, which contains its images.

    python -m llava.eval.model_vqa_mmbench --model-path CHECKPOINT --question-file mmbench_dev_20230712.tsv \\
        --answers-file answers/NAME.jsonl --single-pred-prompt --temperature 0
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from llava.eval.benchmarks import mmbench
from llava.eval.model_vqa_loader import answer_file, build_parser
from llava.eval.run.questions import Question
from llava.utils import guarded


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser(__doc__, max_new_tokens=1024)
    parser.add_argument("--all-rounds", action="store_true", help="ask once for every rotation of the options")
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter only")
    parser.add_argument("--lang", default="en", help="language of that request: en or cn (default %(default)s)")
    args = parser.parse_args(argv)
    table = functools.lru_cache(maxsize=1)(mmbench.read_table)

    def read(path: Path) -> list[Question]:
        return mmbench.make_questions(
            table(path), all_rounds=args.all_rounds, single_pred_prompt=args.single_pred_prompt, lang=args.lang
        )

    return answer_file(args, read, lambda path: mmbench.table_images(table(path)))


if __name__ == "__main__":
    raise SystemExit(main())
