"""Answer a question file with long answers (MM-Vet, LLaVA-Bench): `model_vqa_loader` with up to 1,024 new tokens.

    python -m llava.eval.model_vqa --model-path CHECKPOINT --image-folder DIR --question-file FILE.jsonl \\
        --answers-file answers/FILE.jsonl --temperature 0
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.model_vqa_loader import answer_file, build_parser
from llava.eval.options import complete_args
from llava.eval.run.questions import get_chunk, split_list
from llava.utils import guarded

__all__ = ["eval_model", "get_chunk", "main", "split_list"]


def eval_model(args: object) -> None:
    """Answer the question file of `args`, whose attributes are the program's flags; missing ones take the defaults."""
    answer_file(complete_args(build_parser(__doc__, max_new_tokens=1024), args))


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    return answer_file(build_parser(__doc__, max_new_tokens=1024).parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
