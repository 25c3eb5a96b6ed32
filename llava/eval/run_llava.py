"""Print the answer to one question about one or more images.

python -m llava.eval.run_llava --model-path CHECKPOINT --image-file photo.jpg --query "What is this?"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template, template_for
from llava.engine.arguments import EngineArgs, add_conv_mode_arg, add_sampling_args, sampling_params
from llava.engine.chat import ChatSession, load_image
from llava.eval.options import complete_args
from llava.mm_utils import get_model_name_from_path
from llava.utils import guarded

__all__ = ["eval_model", "load_image", "main"]

PLACEHOLDER = "<image-placeholder>"  # position of an image inside a query


def build_parser(*, required: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    EngineArgs.add_cli_args(parser, required=required)
    add_conv_mode_arg(parser)
    add("--image-file", required=required, help="path or URL, or several separated by --sep")
    add("--query", required=required, help=f"the question; {PLACEHOLDER} marks the position of an image")
    add("--sep", default=",", help="separator of several images (default %(default)r)")
    add_sampling_args(parser, temperature=0.0, max_new_tokens=512)
    return parser


def eval_model(args: object) -> None:
    """Print the answer to `args.query` about the images in `args.image_file`.

    The attributes of `args` are the program's flags, and `model_name` (default: derived from the path); missing ones
    take the flags' defaults.
    """
    _answer(complete_args(build_parser(required=False), args))


def _answer(args: argparse.Namespace) -> None:
    params = sampling_params(args)
    if args.conv_mode is not None:
        get_template(args.conv_mode)  # reports an unknown template before loading the model
    sources = [source.strip() for source in args.image_file.split(args.sep)] if args.sep else [args.image_file]
    images = [load_image(source) for source in sources]
    engine = EngineArgs.from_cli_args(args, max_batch_size=1).build_engine()
    name = getattr(args, "model_name", None) or get_model_name_from_path(args.model_path)
    session = ChatSession(engine, template_for(engine.model.config, name, args.conv_mode), params)
    for source, image in zip(sources, images):
        session.attach(source, image)
    print(session.ask(args.query.replace(PLACEHOLDER, DEFAULT_IMAGE_TOKEN)).result().text)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    _answer(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
