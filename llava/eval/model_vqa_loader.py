"""Answer a JSON Lines question file with short answers, in question order.

    python -m llava.eval.model_vqa_loader --model-path CHECKPOINT --image-folder DIR --question-file FILE.jsonl \\
        --answers-file answers/FILE.jsonl --temperature 0
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llava.conversation import conv_templates, get_template
from llava.engine.chat import render_question
from llava.errors import ConfigError, DataError
from llava.eval.options import EvalArgs, complete_args
from llava.eval.run.images import ImageSource
from llava.eval.run.questions import Question, get_chunk, read_questions
from llava.eval.run.runner import report, run
from llava.images import open_image
from llava.mm_utils import encode_prompt, process_images
from llava.parent_process import exit_with_parent
from llava.utils import guarded

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileArgs(EvalArgs):
    """Settings of the `model_vqa*` programs."""

    image_folder: Path = Path()
    question_file: Path = Path("tables/question.jsonl")
    answers_file: Path = Path("answer.jsonl")
    num_chunks: int = 1
    chunk_idx: int = 0


def build_parser(
    doc: str | None = __doc__, question_file: str = "tables/question.jsonl", max_new_tokens: int = 128
) -> argparse.ArgumentParser:
    """The flags of the `model_vqa*` programs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image-folder", type=Path, default=Path(), help="directory of the images (default: current directory)")
    add("--question-file", type=Path, default=Path(question_file), help="default: %(default)s")
    add("--answers-file", type=Path, default=Path("answer.jsonl"), help="default: %(default)s")
    add("--num-chunks", type=int, default=1, help="number of chunks of the questions (default %(default)s)")
    add("--chunk-idx", type=int, default=0, help="chunk to answer, from 0 (default %(default)s)")
    EvalArgs.add_cli_args(parser, temperature=0.2, max_new_tokens=max_new_tokens)
    return parser


def mmtag_template(name: str, model_name: str, explicit: bool) -> str:
    """The `_mmtag` variant of a template for a `plain` model, if it exists and `--conv-mode` was given (`explicit`)."""
    is_plain = "plain" in model_name and "finetune" not in model_name.lower()
    if not explicit or not is_plain or "mmtag" in name:
        return name
    variant = f"{name}_mmtag"
    if variant not in conv_templates:
        logger.warning(
            "%s is the name of a plain model, but template %s does not exist; using %s.", model_name, variant, name
        )
        return name
    logger.warning("%s is the name of a plain model; using template %s instead of %s.", model_name, variant, name)
    return variant


def answer_file(
    namespace: argparse.Namespace,
    read: Callable[[Path], Sequence[Question]] = read_questions,
    images: Callable[[Path], ImageSource] | None = None,
    follow_up: str | None = None,
) -> int:
    """Answer the questions that `read` returns for the question file.

    Images come from `--image-folder`, or from the source that `images` returns for the question file. For `follow_up`
    see `RunSettings`. Returns the exit status: 1 if a question failed, else 0.
    """
    exit_with_parent()
    args = FileArgs.from_cli_args(namespace)
    question_file, answers_file, image_folder = map(Path, (args.question_file, args.answers_file, args.image_folder))
    if not question_file.is_file():
        raise DataError(f"--question-file {str(question_file)!r} is not a file.")
    questions = read(question_file)[: args.limit]
    if not questions:
        raise DataError(f"--question-file {question_file} has no questions.")
    if images is None and not image_folder.is_dir() and any(question.images for question in questions):
        raise DataError(f"--image-folder {str(image_folder)!r} is not a directory.")
    get_chunk(questions, args.num_chunks, args.chunk_idx)  # reports a bad index before loading the model
    model, template = args.load_model()
    settings = dataclasses.replace(
        args.run_settings(mmtag_template(template, args.model_name, args.conv_mode is not None), image_folder),
        chunk=(args.chunk_idx, args.num_chunks),
        files=(question_file,),
        images=images(question_file) if images else None,
        follow_up=follow_up,
    )
    outcome = run(model, questions, answers_file, settings)
    return report(outcome, answers_file, lambda line: print(line, file=sys.stderr))


def eval_model(args: object) -> None:
    """Answer the question file of `args`, whose attributes are the program's flags; missing ones take the defaults."""
    answer_file(complete_args(build_parser(), args))


@dataclass(frozen=True)
class CustomDataset(Dataset[tuple[Tensor, Tensor]]):
    """The items of `create_data_loader`, without their batch axis."""

    questions: Sequence[Mapping[str, str]]
    image_folder: Path
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    model_config: PretrainedConfig
    conv_mode: str

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.questions[index]
        prompt = render_question(get_template(self.conv_mode), row["text"], 1, self.model_config)
        image = open_image(self.image_folder / row["image"])
        pixels: Tensor = process_images([image], self.image_processor, self.model_config)[0]
        return torch.tensor(encode_prompt(prompt, self.tokenizer)), pixels


def create_data_loader(
    questions: Sequence[Mapping[str, str]],
    image_folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor,
    model_config: PretrainedConfig,
    batch_size: int = 1,
    num_workers: int = 4,
    conv_mode: str = "vicuna_v1",
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader of one question at a time, in order, for `model.generate`.

    Args:
        questions: rows of a question file, with `text` and `image`.
        batch_size: must be 1.
        conv_mode: conversation template of the prompts.

    Yields token ids (1, T) with `IMAGE_TOKEN_INDEX` and pixels (1, 3, S, S).
    """
    if batch_size != 1:
        raise ConfigError(f"batch_size must be 1, got {batch_size}.")
    dataset = CustomDataset(questions, Path(image_folder), tokenizer, image_processor, model_config, conv_mode)
    return DataLoader(dataset, batch_size=1, num_workers=num_workers)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    return answer_file(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
