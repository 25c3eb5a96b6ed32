"""One answer to one question about one picture or several, on stdout (spec/eval.md §2.2).

python -m llava.eval.run_llava --model-path CHECKPOINT --image-file photo.jpg --query "What is this?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import template_for
from llava.eval import options
from llava.mm_utils import get_model_name_from_path
from llava.serve.chat_session import ChatSession
from llava.utils import guarded

PLACEHOLDER = "<image-placeholder>"  # where a picture belongs inside a query


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_model_flags(parser)
    parser.add_argument("--image-file", required=True, help="path or https address, or several with --sep between")
    parser.add_argument("--query", required=True, help=f"the question; {PLACEHOLDER} marks a picture's place")
    parser.add_argument("--sep", default=",", help="between several pictures (default %(default)r)")
    options.add_decoding_flags(parser, temperature=0.0, max_new_tokens=512)
    parser.set_defaults(batch_size=1)
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    params = options.sampling(args)
    engine = options.build_engine(args)
    template = template_for(engine.model.config, get_model_name_from_path(args.model_path), args.conv_mode)
    session = ChatSession(engine, template, params)
    for source in args.image_file.split(args.sep):
        session.attach(source.strip())
    print(session.ask(args.query.replace(PLACEHOLDER, DEFAULT_IMAGE_TOKEN)).result().text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
