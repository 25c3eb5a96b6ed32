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

from llava.conversation import conv_templates
from llava.engine.arguments import EngineArgs, add_conv_mode_arg, add_sampling_args
from llava.errors import DataError
from llava.eval import options
from llava.eval.run.images import ImageSource
from llava.eval.run.questions import Question, get_chunk, read_questions
from llava.eval.run.runner import report, run
from llava.parent_process import exit_with_parent
from llava.utils import guarded

logger = logging.getLogger(__name__)


def build_parser(
    doc: str | None = __doc__, question_file: str = "tables/question.jsonl", max_new_tokens: int = 128
) -> argparse.ArgumentParser:
    """The flags of spec/eval.md §2.1 that all runners share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    EngineArgs.add_cli_args(parser, required=False)
    add_conv_mode_arg(parser)
    options.add_api_flags(parser)
    parser.add_argument("--image-folder", type=Path, default=Path())
    parser.add_argument("--question-file", type=Path, default=Path(question_file))
    parser.add_argument("--answers-file", type=Path, default=Path("answer.jsonl"))
    parser.add_argument("--num-chunks", type=int, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0)
    add_sampling_args(parser, temperature=0.2, max_new_tokens=max_new_tokens)
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


def answer_file(
    args: argparse.Namespace,
    read: Callable[[Path], Sequence[Question]],
    pictures: Callable[[Path], ImageSource] | None = None,
    follow_up: str | None = None,
) -> int:
    """Answer what `read` finds in the question file; the exit status, 1 when a question could not be answered.

    Pictures are in `--image-folder`, or where `pictures` finds them in the question file; for `follow_up` see
    `RunSettings`.
    """
    exit_with_parent()
    options.check(args)
    if not args.question_file.is_file():
        raise DataError(f"There is no question file {str(args.question_file)!r}; correct --question-file.")
    questions = read(args.question_file)[: args.limit]
    if not questions:
        raise DataError(f"{args.question_file} holds no questions; correct --question-file.")
    if pictures is None and not args.image_folder.is_dir() and any(question.images for question in questions):
        raise DataError(f"There is no folder {str(args.image_folder)!r}; correct --image-folder.")
    get_chunk(questions, args.num_chunks, args.chunk_idx)  # refused before a model is loaded
    model, template = options.build_model(args)
    template = plain_override(template, options.model_name(args), args.conv_mode is not None)
    settings = dataclasses.replace(
        options.settings_from(args, template, args.image_folder),
        chunk=(args.chunk_idx, args.num_chunks),
        files=(args.question_file,),
        pictures=pictures(args.question_file) if pictures else None,
        follow_up=follow_up,
    )
    outcome = run(model, questions, args.answers_file, settings)
    return report(outcome, args.answers_file, lambda line: print(line, file=sys.stderr))


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    return answer_file(build_parser().parse_args(argv), read_questions)


if __name__ == "__main__":
    sys.exit(main())
