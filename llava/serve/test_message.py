"""Ask a running model one thing and show the answer as it comes: a smoke test (spec/serve.md §6).

python -m llava.serve.test_message --controller http://localhost:10000 --model-name MODEL [--image photo.jpg]
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava.conversation import get_template, stop_strings, template_for, with_image_token
from llava.errors import ConfigError
from llava.utils import guarded, require


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--controller-address", "--controller", default="http://localhost:21001")
    add("--worker-address", "--worker", help="ask this worker, without a controller")
    add("--model-name", help="default: the first in the list of models")
    add("--max-new-tokens", type=int, default=32)
    add("--message", default="Tell me a long story about a lighthouse.")
    add("--image", type=Path, action="append", default=[], help="JPEG, PNG or WebP file; repeatable")
    add("--conv-mode", help="template (default: the one the model was trained with)")
    add("--temperature", type=float, default=0.7)
    add("--token-file", type=Path, help="file with the shared token (default: LLAVA_TOKEN)")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    require("httpx", "serve")
    from llava.serve.common.client import Client

    with Client(args.token_file) as client:
        if args.worker_address:
            address = args.worker_address
            served = client.post(address, "/worker_get_status")["model_names"]
        else:
            client.post(args.controller_address, "/refresh_all_workers")
            served = sorted(client.post(args.controller_address, "/list_models")["models"])
            print(f"Models: {', '.join(served) or 'none'}")
        model = args.model_name or next(iter(served), "")
        if not args.worker_address:
            address = client.post(args.controller_address, "/get_worker_address", {"model": model})["address"]
        print(f"{model or 'A model'} is at {address or 'no address'}.")
        if not address:
            raise ConfigError(f"No worker serves {model or 'anything'}; start one, or wait until it has loaded.")
        info = client.post(address, "/worker_get_status").get("info") or {}
        template = args.conv_mode or info.get("conv_template") or template_for(None, model)
        body = body_for(args, model, template)
        return show(client.stream(address, body), len(str(body["prompt"])))


def body_for(args: argparse.Namespace, model: str, template: str) -> dict[str, object]:
    """The request: one turn in the model's template."""
    conversation = get_template(template)
    text = with_image_token(args.message, conversation, None, len(args.image)) if args.image else args.message
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    try:
        images = [base64.b64encode(path.read_bytes()).decode() for path in args.image]
    except OSError as error:
        raise ConfigError(f"Cannot read the image {error.filename}: {error.strerror}.") from error
    return {
        "model": model,
        "prompt": conversation.get_prompt(),
        "images": images,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "stop": list(stop_strings(conversation)),
    }


def show(frames: Iterable[dict[str, Any]], skip: int) -> int:
    """Print the answer behind `skip` characters of prompt as it grows; status 1 after an error, or without a frame."""
    shown, frame = "", None
    for frame in frames:
        if frame.get("error_code"):
            print(f"\nerror {frame['error_code']}: {frame.get('text')}", file=sys.stderr)
            return 1
        answer = frame["text"][skip:].lstrip()
        print(answer[len(shown) :], end="", flush=True)
        shown = answer or shown
    print()
    return 0 if frame is not None else 1


if __name__ == "__main__":
    sys.exit(main())
