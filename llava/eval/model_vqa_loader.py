"""Answer a question file in JSON Lines (spec/eval.md §2): one short answer a question, in question order.

    python -m llava.eval.model_vqa_loader --model-path CHECKPOINT --image-folder DIR --question-file FILE.jsonl \\
        --answers-file answers/FILE.jsonl --temperature 0
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.conversation import conv_templates, template_for
from llava.errors import DataError
from llava.eval import options
from llava.eval.questions import Question, get_chunk, read_questions
from llava.eval.runner import report, run
from llava.mm_utils import get_model_name_from_path
from llava.utils import guarded

logger = logging.getLogger(__name__)


def build_parser(
    doc: str | None = __doc__, question_file: str = "tables/question.jsonl", max_new_tokens: int = 128
) -> argparse.ArgumentParser:
    """The flags of spec/eval.md §2.1 that all runners share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_model_flags(parser)
    parser.add_argument("--image-folder", type=Path, default=Path())
    parser.add_argument("--question-file", type=Path, default=Path(question_file))
    parser.add_argument("--answers-file", type=Path, default=Path("answer.jsonl"))
    parser.add_argument("--num-chunks", type=int, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0)
    options.add_decoding_flags(parser, temperature=0.2, max_new_tokens=max_new_tokens)
    options.add_run_flags(parser)
    return parser


def plain_override(name: str, model_name: str, explicit: bool) -> str:
    """The `_mmtag` variant for a `plain` model (spec/eval.md §1.4), when it exists and `--conv-mode` was given (R6)."""
    wanted = explicit and "plain" in model_name and "finetune" not in model_name.lower() and "mmtag" not in name
    if not wanted:
        return name
    if f"{name}_mmtag" in conv_templates:
        logger.warning("The model's name says it is a plain model; using template %s_mmtag instead of %s.", name, name)
        return f"{name}_mmtag"
    logger.warning(
        "The model's name says it is a plain model, but there is no template %s_mmtag; using %s.", name, name
    )
    return name


def answer_file(args: argparse.Namespace, read: Callable[[Path], Sequence[Question]]) -> int:
    """Answer what `read` finds in the question file; the exit status, 1 when a question could not be answered."""
    if not args.question_file.is_file():
        raise DataError(f"There is no question file {str(args.question_file)!r}; correct --question-file.")
    questions = get_chunk(read(args.question_file), args.num_chunks, args.chunk_idx)[: args.limit]
    engine = options.build_engine(args)
    name = get_model_name_from_path(args.model_path)
    template = plain_override(template_for(engine.model.config, name, args.conv_mode), name, args.conv_mode is not None)
    settings = options.settings_from(args, template, args.image_folder)
    settings = dataclasses.replace(settings, chunk=(args.chunk_idx, args.num_chunks))
    outcome = run(engine, questions, args.answers_file, settings)
    return report(outcome, args.answers_file, lambda line: print(line, file=sys.stderr))


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    return answer_file(build_parser().parse_args(argv), read_questions)


if __name__ == "__main__":
    sys.exit(main())
