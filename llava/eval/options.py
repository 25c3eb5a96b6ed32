"""Flags shared by the evaluation programs (spec/eval.md §2.1), and the engine and settings they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava.conversation import get_template, template_for
from llava.engine import Engine
from llava.engine.arguments import EngineArgs, sampling_params
from llava.errors import ConfigError
from llava.eval.run.endpoint import address, only_model
from llava.eval.run.remote_model import RemoteModel
from llava.eval.run.settings import RunSettings
from llava.mm_utils import get_model_name_from_path


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
    sampling_params(args)
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
    engine = EngineArgs.from_cli_args(args, max_batch_size=args.batch_size).build_engine()
    return engine, template_for(engine.model.config, name, args.conv_mode)


def settings_from(
    args: argparse.Namespace, template: str, image_folder: Path, max_new_tokens: int = 128
) -> RunSettings:
    return RunSettings(
        model_path=str(args.model_path),
        model_id=model_name(args),
        template=template,
        params=sampling_params(args, max_new_tokens),
        image_folder=image_folder,
        num_workers=args.num_workers,
        resume=args.resume,
        overwrite=args.overwrite,
        quantization="8 bit" if args.load_8bit else "4 bit" if args.load_4bit else None,
    )
