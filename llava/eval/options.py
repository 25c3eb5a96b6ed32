"""Flags shared by the evaluation programs (spec/eval.md §2.1), and the engine and settings they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from llava.conversation import get_template, template_for
from llava.engine import Engine, SamplingParams, load_engine
from llava.engine.arguments import add_loading_flags, loading_options
from llava.engine.memory import add_cache_flags, cache_options
from llava.errors import ConfigError
from llava.eval.run.endpoint import address, only_model
from llava.eval.run.remote_model import RemoteModel
from llava.eval.run.settings import RunSettings
from llava.mm_utils import get_model_name_from_path


def add_model_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """What to load and where to run it."""
    parser.add_argument("--model-path", required=required, help="checkpoint directory")
    parser.add_argument("--model-base", help="language model under a projector or LoRA checkpoint")
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float32 on CPU, else 16 bit)")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")
    add_loading_flags(parser)
    add_cache_flags(parser)
    parser.add_argument("--conv-mode", help="template name (default: the one the checkpoint was trained with)")
    parser.add_argument(
        "--image-aspect-ratio",
        choices=("config", "pad", "crop"),
        default="config",
        help="pad to a square, or crop the centre (default: as the checkpoint was trained)",
    )


def add_decoding_flags(parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int | None) -> None:
    """How to decode."""
    parser.add_argument("--temperature", type=float, default=temperature, help="0 is greedy (default %(default)s)")
    parser.add_argument("--top_p", "--top-p", type=float, default=None, help="nucleus sampling (default: off)")
    parser.add_argument("--num_beams", "--num-beams", type=int, default=1)
    parser.add_argument(
        "--max-new-tokens", "--max_new_tokens", type=int, default=max_new_tokens, help="limit of an answer"
    )
    parser.add_argument("--seed", type=int, default=0, help="makes sampled answers reproducible (default %(default)s)")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """How to go through the questions."""
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=4, help="worker processes that load and preprocess images")
    parser.add_argument("--limit", type=int, help="ask only this many questions")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue an answers file even without its manifest")
    group.add_argument("--overwrite", action="store_true", help="start the answers file afresh")


def add_api_flags(parser: argparse.ArgumentParser) -> None:
    """Asking a server instead of loading a checkpoint."""
    parser.add_argument("--api-base", help="ask a server with OpenAI's API, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--api-model", help="its model's name (default: the only one it lists)")
    parser.add_argument("--api-timeout", type=float, default=600.0, help="seconds for a reply (default %(default)s)")


def check(args: argparse.Namespace) -> None:
    """Refuse numbers and names that cannot be honoured, before data are read and a model is loaded."""
    for name in ("limit", "batch_size", "num_chunks"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    sampling(args)
    if args.conv_mode is not None:
        get_template(args.conv_mode)


def model_name(args: argparse.Namespace) -> str:
    """What the model is called in answers and folders; asks the server for it if need be."""
    if args.api_base is None:
        if args.model_path is None:
            raise ConfigError("No model: give --model-path CHECKPOINT, or --api-base URL of a server.")
        return get_model_name_from_path(args.model_path)
    if args.model_path is not None:
        raise ConfigError("Give either --model-path or --api-base, not both.")
    args.api_model = args.api_model or only_model(address(args.api_base))
    return get_model_name_from_path(args.api_model)


def build_model(args: argparse.Namespace) -> tuple[Engine | RemoteModel, str]:
    """What is asked, and the name of its template; a server has its own."""
    name = model_name(args)
    if args.api_base is not None:
        remote = RemoteModel(args.api_base, args.api_model, batch_size=args.batch_size, timeout=args.api_timeout)
        return remote, ""
    engine = build_engine(args)
    return engine, template_for(engine.model.config, name, args.conv_mode)


def build_engine(args: argparse.Namespace, progress: Callable[[float], None] | None = None) -> Engine:
    """The engine of the flags. `progress` is told the share of the weights read; without it, a terminal shows it."""
    if progress is None:
        line = "weights read: {percentage:3.0f} %|{bar:30}|"
        with tqdm(total=1.0, bar_format=line, disable=None, leave=False) as shown:
            return build_engine(args, lambda share: shown.update(share - shown.n))
    aspect = {"config": None, "pad": "pad", "crop": "crop"}[args.image_aspect_ratio]
    return load_engine(
        args.model_path,
        args.model_base,
        device=args.device,
        dtype=args.dtype,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        max_batch_size=args.batch_size,
        image_aspect_ratio=aspect,
        **cache_options(args),
        loading={**loading_options(args), "progress": progress},
    )


def sampling(args: argparse.Namespace, max_new_tokens: int = 128) -> SamplingParams:
    """Decoding as the flags say; `max_new_tokens` when they do not."""
    return SamplingParams(
        max_new_tokens=max_new_tokens if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_p=1.0 if args.top_p is None else args.top_p,
        seed=args.seed,
        num_beams=args.num_beams,
    )


def settings_from(
    args: argparse.Namespace, template: str, image_folder: Path, max_new_tokens: int = 128
) -> RunSettings:
    return RunSettings(
        model_path=str(args.model_path),
        model_id=model_name(args),
        template=template,
        params=sampling(args, max_new_tokens),
        image_folder=image_folder,
        num_workers=args.num_workers,
        resume=args.resume,
        overwrite=args.overwrite,
        quantization="8 bit" if args.load_8bit else "4 bit" if args.load_4bit else None,
    )
