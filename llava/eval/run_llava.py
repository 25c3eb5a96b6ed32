"""One answer to one question about one picture or several, on stdout (spec/eval.md §2.2).

python -m llava.eval.run_llava --model-path CHECKPOINT --image-file photo.jpg --query "What is this?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import template_for
from llava.engine.arguments import EngineArgs, add_conv_mode_arg, add_sampling_args, sampling_params
from llava.engine.chat import ChatSession, load_image
from llava.eval import options
from llava.mm_utils import get_model_name_from_path
from llava.utils import guarded

PLACEHOLDER = "<image-placeholder>"  # where a picture belongs inside a query


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    EngineArgs.add_cli_args(parser)
    add_conv_mode_arg(parser)
    parser.add_argument("--image-file", required=True, help="path or https address, or several with --sep between")
    parser.add_argument("--query", required=True, help=f"the question; {PLACEHOLDER} marks a picture's place")
    parser.add_argument("--sep", default=",", help="between several pictures (default %(default)r)")
    add_sampling_args(parser, temperature=0.0, max_new_tokens=512)
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    options.check(args)
    sources = [source.strip() for source in args.image_file.split(args.sep)] if args.sep else [args.image_file]
    pictures = [load_image(source) for source in sources]  # what is wrong shows before a model is loaded
    engine = EngineArgs.from_cli_args(args, max_batch_size=1).build_engine()
    template = template_for(engine.model.config, get_model_name_from_path(args.model_path), args.conv_mode)
    session = ChatSession(engine, template, sampling_params(args))
    for source, picture in zip(sources, pictures):
        session.attach(source, picture)
    print(session.ask(args.query.replace(PLACEHOLDER, DEFAULT_IMAGE_TOKEN)).result().text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
