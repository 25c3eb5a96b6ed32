"""Talk with a model about pictures, in the terminal (spec/serve.md §7).

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
from llava.engine import Engine
from llava.engine.arguments import EngineArgs, add_conv_mode_arg, add_sampling_args, sampling_params
from llava.engine.chat import ChatSession, is_stage_one, load_image
from llava.errors import ConfigError
from llava.eval.run.runner import RunSettings, report
from llava.mm_utils import get_model_name_from_path
from llava.serve.chat_batch import run_batch
from llava.serve.chat_terminal import answer, converse
from llava.utils import guarded


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    EngineArgs.add_cli_args(parser)
    add_conv_mode_arg(parser)
    add_sampling_args(parser, temperature=0.2, max_new_tokens=512)
    parser.set_defaults(seed=None)  # a conversation is not the same every time unless asked to be
    add("--image-file", "--image", action="append", default=[], help="path or https address; repeatable")
    add("--system", help="replaces the template's system message")
    add("--prompt", help="answer this one message and leave")
    add("--json", action="store_true", help="with --prompt: print one JSON object")
    add("--input", type=Path, help='JSON Lines of {"prompt": …, "image": …} to answer')
    add("--output", type=Path, help="with --input: where the answers go; continued if it exists")
    add("--overwrite", action="store_true", help="with --output: start afresh")
    add("--batch-size", type=int, default=16, help="with --input: prompts at a time")
    add("--debug", action="store_true", help="show the rendered prompt after each turn")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse combinations that make no sense before the model is loaded."""
    if (args.input is None) != (args.output is None):
        raise ConfigError("--input and --output go together; give both or neither.")
    if args.input is not None and (args.prompt is not None or args.image_file or args.system):
        raise ConfigError("--input brings its own prompts and images; leave --prompt, --image-file and --system out.")
    if args.json and args.prompt is None:
        raise ConfigError("--json prints the answer to --prompt; give a --prompt.")
    if args.input is not None and not args.input.is_file():
        raise ConfigError(f"--input {args.input} is no file; give JSON Lines of prompts.")


def answer_once(session: ChatSession, prompt: str, as_json: bool, debug: bool) -> int:
    completion = answer(session, prompt, None if as_json else sys.stdout)
    if as_json:
        facts = {
            "prompt": prompt,
            "images": session.sources,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": len(completion.token_ids),
            "template": session.template,
        }
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print()
    if debug:
        print({"prompt": session.prompt, "outputs": completion.text}, file=sys.stderr)
    return 130 if completion.finish_reason == "cancelled" else 0


def answer_file(engine: Engine, args: argparse.Namespace, template: str, name: str) -> int:
    settings = RunSettings(
        model_path=args.model_path,
        model_id=name,
        template=template,
        params=sampling_params(args),
        overwrite=args.overwrite,
    )
    outcome = run_batch(engine, args.input, args.output, settings)
    return report(outcome, args.output, lambda line: print(line, file=sys.stderr))


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check(args)
    params = sampling_params(args)
    pictures = [(source, load_image(source)) for source in args.image_file]
    print(f"Loading {args.model_path} …", file=sys.stderr)
    engine = EngineArgs.from_cli_args(args, max_batch_size=args.batch_size).build_engine()
    config = engine.model.config
    name = get_model_name_from_path(args.model_path)
    template = template_for(config, name, args.conv_mode)
    if is_stage_one(config):
        print("This is a stage-1 model (only its projector is trained): expect captions, not answers.", file=sys.stderr)
    if args.input is not None:
        return answer_file(engine, args, template, name)
    session = ChatSession(engine, template, params, args.system)
    for source, picture in pictures:
        session.attach(source, picture)
    if args.prompt is not None:
        return answer_once(session, args.prompt, args.json, args.debug)
    return converse(session, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
