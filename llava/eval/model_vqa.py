"""Answer a question file whose answers may be long (MM-Vet, LLaVA-Bench): `model_vqa_loader` with 1,024 new tokens.

    python -m llava.eval.model_vqa --model-path CHECKPOINT --image-folder DIR --question-file FILE.jsonl \\
        --answers-file answers/FILE.jsonl --temperature 0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.eval.model_vqa_loader import answer_file, build_parser
from llava.eval.run.questions import read_questions
from llava.utils import guarded


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    return answer_file(build_parser(__doc__, max_new_tokens=1024).parse_args(argv), read_questions)


if __name__ == "__main__":
    sys.exit(main())
