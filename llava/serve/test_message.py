"""Send one message to a served model and print the streamed answer, as a smoke test.

python -m llava.serve.test_message --controller http://localhost:10000 --model-name MODEL [--image photo.jpg]
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.conversation import get_template, stop_strings, template_for, with_image_token
from llava.errors import ConfigError
from llava.serve.common.arguments import CONTROLLER_URL, TOKEN_VARIABLE
from llava.utils import guarded, require

if TYPE_CHECKING:
    from llava.serve.common.protocol import Frame


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--controller-address", "--controller", default=CONTROLLER_URL, help="controller URL (default %(default)s)")
    add("--worker-address", "--worker", help="worker URL, to bypass the controller")
    add("--model-name", help="default: the first model in the list")
    add("--max-new-tokens", type=int, default=32, help="length limit of the answer (default %(default)s)")
    add("--message", default="Tell me a long story about a lighthouse.")
    add("--image", type=Path, action="append", default=[], help="JPEG, PNG or WebP file; repeatable")
    add("--conv-mode", help="conversation template (default: the one the model was trained with)")
    add("--temperature", type=float, default=0.7)
    add("--token-file", type=Path, help=f"file with the shared token (default: {TOKEN_VARIABLE})")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    require("httpx", "serve")
    from llava.serve.common.client import Client

    with Client(args.token_file) as client:
        if args.worker_address:
            address = args.worker_address
            models = client.post(address, "/worker_get_status")["model_names"]
        else:
            client.post(args.controller_address, "/refresh_all_workers")
            models = sorted(client.post(args.controller_address, "/list_models")["models"])
            print(f"Models: {', '.join(models) or 'none'}")
        model = args.model_name or next(iter(models), "")
        if not args.worker_address:
            address = client.post(args.controller_address, "/get_worker_address", {"model": model})["address"]
        if not address:
            raise ConfigError(f"No worker serves {model or 'a model'}; start one, or wait until it has loaded.")
        print(f"Worker of {model or 'the model'}: {address}")
        info = client.post(address, "/worker_get_status").get("info") or {}
        info = next((one for one in info.get("adapters", ()) if one.get("name") == model), info)
        template = args.conv_mode or info.get("conv_template") or template_for(None, model)
        body = request_body(args, model, template)
        return print_stream(client.stream(address, body), len(str(body["prompt"])))


def request_body(args: argparse.Namespace, model: str, template: str) -> dict[str, object]:
    """Body of `/worker_generate_stream` with one turn in the conversation template."""
    conversation = get_template(template)
    text = with_image_token(args.message, conversation, None, len(args.image)) if args.image else args.message
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    try:
        images = [base64.b64encode(path.read_bytes()).decode() for path in args.image]
    except OSError as error:
        raise ConfigError(f"Cannot read image {error.filename}: {error.strerror}.") from error
    prompt = conversation.get_prompt()
    return {
        "model": model,
        "prompt": prompt,
        "text_spans": prompt.text_spans,
        "images": images,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "stop": list(stop_strings(conversation)),
    }


def print_stream(frames: Iterable[Frame], prompt_length: int) -> int:
    """Print the answer as it grows; returns the exit status, 1 after an error or an empty stream."""
    shown, frame = "", None
    for frame in frames:
        if frame.get("error_code"):
            print(f"\nerror {frame['error_code']}: {frame.get('text')}", file=sys.stderr)
            return 1
        answer = frame["text"][prompt_length:].lstrip()
        print(answer[len(shown) :], end="", flush=True)
        shown = answer or shown
    print()
    return 0 if frame is not None else 1


if __name__ == "__main__":
    sys.exit(main())
