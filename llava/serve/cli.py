"""Chat with a model about images in the terminal, answer one prompt, or answer a file of prompts.

python -m llava.serve.cli --model-path CHECKPOINT --image-file photo.jpg          # a conversation
python -m llava.serve.cli --model-path CHECKPOINT --image-file a.png --prompt "What is this?" [--json]
python -m llava.serve.cli --model-path CHECKPOINT --input prompts.jsonl --output answers.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.conversation import template_for
from llava.engine.arguments import EngineArgs, add_conv_mode_arg, add_sampling_args, sampling_params
from llava.engine.chat import ChatSession, is_stage_one, load_image
from llava.errors import ConfigError
from llava.mm_utils import get_model_name_from_path
from llava.serve.chat_batch import BatchSettings, answer_prompts
from llava.serve.chat_terminal import answer, chat
from llava.utils import guarded

__all__ = ["load_image", "main"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    EngineArgs.add_cli_args(parser)
    add_conv_mode_arg(parser)
    add_sampling_args(parser, temperature=0.2, max_new_tokens=512)
    parser.set_defaults(seed=None)  # a conversation is random by default
    add("--image-file", "--image", action="append", default=[], help="path or https URL; repeatable")
    add("--system", help="system message (default: the template's)")
    add("--prompt", help="answer this one message and exit")
    add("--json", action="store_true", help="with --prompt: print one JSON object")
    add("--input", type=Path, help='JSON Lines of {"prompt": …, "image": …} to answer')
    add("--output", type=Path, help="with --input: file of the answers; an existing one is continued")
    add("--overwrite", action="store_true", help="with --output: discard existing answers")
    add("--batch-size", type=int, default=16, help="with --input: prompts per batch (default %(default)s)")
    add("--debug", action="store_true", help="print the rendered prompt after each turn")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise `ConfigError` for contradictory flags, before the model is loaded."""
    if (args.input is None) != (args.output is None):
        raise ConfigError("--input and --output require each other; pass both or neither.")
    if args.input is not None and (args.prompt is not None or args.image_file or args.system):
        raise ConfigError("--input cannot be combined with --prompt, --image-file or --system.")
    if args.json and args.prompt is None:
        raise ConfigError("--json requires --prompt.")
    if args.input is not None and not args.input.is_file():
        raise ConfigError(f"--input must be a file of JSON Lines, but {args.input} is not a file.")


def answer_once(session: ChatSession, prompt: str, as_json: bool, debug: bool) -> int:
    """Print the answer to one prompt; returns the exit status."""
    completion = answer(session, prompt, None if as_json else sys.stdout)
    if as_json:
        result = {
            "prompt": prompt,
            "images": session.sources,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": len(completion.token_ids),
            "template": session.template,
        }
        print(json.dumps(result, ensure_ascii=False))
    else:
        print()
    if debug:
        print({"prompt": session.prompt, "outputs": completion.text}, file=sys.stderr)
    return 130 if completion.finish_reason == "cancelled" else 0


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check(args)
    params = sampling_params(args)
    images = [(source, load_image(source)) for source in args.image_file]
    print(f"Loading {args.model_path} …", file=sys.stderr)
    engine_args = EngineArgs.from_cli_args(args, max_batch_size=args.batch_size)
    engine = engine_args.build_engine()
    name = get_model_name_from_path(args.model_path)
    template = template_for(engine.model.config, name, args.conv_mode)
    if is_stage_one(engine.model.config):
        print("This is a stage-1 checkpoint (only its projector is trained): expect captions.", file=sys.stderr)
    if args.input is not None:
        settings = BatchSettings(
            args.model_path, name, template, params, engine_args.model_base, engine_args.quantization
        )
        result = answer_prompts(engine, args.input, args.output, settings, overwrite=args.overwrite)
        print(result.summary(args.output), file=sys.stderr)
        return 1 if result.failures else 0
    session = ChatSession(engine, template, params, args.system)
    for source, image in images:
        session.attach(source, image)
    if args.prompt is not None:
        return answer_once(session, args.prompt, args.json, args.debug)
    return chat(session, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
