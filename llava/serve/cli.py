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
from llava.engine import Engine, SamplingParams, load_engine
from llava.errors import ConfigError
from llava.eval.runner import RunSettings, report
from llava.mm_utils import get_model_name_from_path
from llava.serve.chat_batch import run_batch
from llava.serve.chat_session import ChatSession, is_stage_one
from llava.serve.chat_terminal import answer, converse
from llava.utils import guarded


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", required=True, help="checkpoint directory")
    add("--model-base", help="language model under a projector or LoRA checkpoint")
    add("--image-file", "--image", action="append", default=[], help="path or https address; repeatable")
    add("--device", help="cuda, cuda:N, mps or cpu (default: the best there is)")
    add("--dtype", help="float32, float16 or bfloat16 (default: float32 on CPU, else 16 bit)")
    add("--load-8bit", action="store_true")
    add("--load-4bit", action="store_true")
    add("--conv-mode", help="template name (default: the one the checkpoint was trained with)")
    add("--system", help="replaces the template's system message")
    add("--image-aspect-ratio", choices=("pad", "crop"), help="default: as the checkpoint was trained")
    add("--temperature", type=float, default=0.2, help="0 is greedy (default %(default)s)")
    add("--top-p", "--top_p", type=float, default=1.0)
    add("--num-beams", "--num_beams", type=int, default=1)
    add("--max-new-tokens", "--max_new_tokens", type=int, default=512)
    add("--seed", type=int, help="makes sampled answers reproducible")
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


def chat_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        num_beams=args.num_beams,
    )


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
        params=chat_params(args),
        overwrite=args.overwrite,
    )
    outcome = run_batch(engine, args.input, args.output, settings)
    return report(outcome, args.output, lambda line: print(line, file=sys.stderr))


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check(args)
    params = chat_params(args)
    print(f"Loading {args.model_path} …", file=sys.stderr)
    engine = load_engine(
        args.model_path,
        args.model_base,
        device=args.device,
        dtype=args.dtype,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        max_batch_size=args.batch_size,
        image_aspect_ratio=args.image_aspect_ratio,
    )
    config = engine.model.config
    name = get_model_name_from_path(args.model_path)
    template = template_for(config, name, args.conv_mode)
    if is_stage_one(config):
        print("This is a stage-1 model (only its projector is trained): expect captions, not answers.", file=sys.stderr)
    if args.input is not None:
        return answer_file(engine, args, template, name)
    session = ChatSession(engine, template, params, args.system)
    for source in args.image_file:
        session.attach(source)
    if args.prompt is not None:
        return answer_once(session, args.prompt, args.json, args.debug)
    return converse(session, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
