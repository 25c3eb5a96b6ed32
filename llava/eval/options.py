"""Settings shared by `llava eval` and the `model_vqa*` programs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llava.conversation import get_template, template_for
from llava.engine import Engine, SamplingParams
from llava.engine.arguments import EngineArgs, add_conv_mode_arg, add_sampling_args, sampling_params
from llava.errors import ConfigError
from llava.eval.run.remote_model import RemoteModel, normalize_url, served_model
from llava.eval.run.runner import RunSettings
from llava.mm_utils import get_model_name_from_path
from llava.utils import CliArgs, flag

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True)
class EvalArgs(CliArgs):
    """Settings of an evaluation: the model or server, decoding, and the processing of questions.

    `engine` is None if the server at `api_base` answers, `max_new_tokens` is None for the default of the benchmark. The
    other fields are the flags of `add_cli_args`; subclasses add the flags of their programs.
    """

    engine: EngineArgs | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    conv_mode: str | None = None
    api_base: str | None = flag(
        None, "OpenAI-compatible server to use instead of a model, as in http://127.0.0.1:8000/v1"
    )
    api_model: str | None = flag(None, "name of the server's model (default: the only one it lists)")
    api_timeout: float = flag(600.0, "timeout of a reply in seconds (default %(default)s)")
    batch_size: int = flag(16, "questions answered concurrently (default %(default)s)")
    num_workers: int = flag(4, "image loading processes (default %(default)s)")
    limit: int | None = flag(None, "number of questions to ask (default: all)", type=int)
    resume: bool = False
    overwrite: bool = False

    @classmethod
    def add_cli_args(
        cls, parser: argparse.ArgumentParser, *, temperature: float = 0.0, max_new_tokens: int | None = None
    ) -> None:
        """Add the flags of the engine, the server, decoding and the processing of questions."""
        EngineArgs.add_cli_args(parser, required=False)
        add_conv_mode_arg(parser)
        super().add_cli_args(parser)
        add_sampling_args(parser, temperature=temperature, max_new_tokens=max_new_tokens)
        group = parser.add_mutually_exclusive_group()
        group.add_argument("--resume", action="store_true", help="continue an answers file that has no manifest")
        group.add_argument("--overwrite", action="store_true", help="start the answers file over")

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace, **values: object) -> Self:
        """Settings from the parsed flags of `add_cli_args`.

        Raises `ConfigError` for values out of range, an unknown template, or without exactly one of model and server.
        """
        for name in ("limit", "batch_size", "num_chunks"):
            value = getattr(args, name, None)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        params = sampling_params(args)
        if args.conv_mode is not None:
            get_template(args.conv_mode)
        if args.model_path is None and args.api_base is None:
            raise ConfigError("No model given; use --model-path CHECKPOINT, or --api-base URL of a server.")
        if args.model_path is not None and args.api_base is not None:
            raise ConfigError("--model-path and --api-base exclude each other; give one of them.")
        engine = None if args.api_base else EngineArgs.from_cli_args(args, max_batch_size=args.batch_size)
        return super().from_cli_args(args, engine=engine, params=params, **values)

    @cached_property
    def served_name(self) -> str:
        """The name of the server's model; without `--api-model`, the server is asked."""
        assert self.api_base is not None
        return self.api_model or served_model(normalize_url(self.api_base))

    @property
    def model_name(self) -> str:
        """The name of the model in answers and folders."""
        return get_model_name_from_path(self.engine.model_path if self.engine else self.served_name)

    def load_model(self) -> tuple[Engine | RemoteModel, str]:
        """The model and the name of its conversation template, which is empty for a server."""
        if self.engine is None:
            assert self.api_base is not None
            size, timeout = self.batch_size, self.api_timeout
            return RemoteModel(self.api_base, self.served_name, batch_size=size, timeout=timeout), ""
        engine = self.engine.build_engine()
        return engine, template_for(engine.model.config, self.model_name, self.conv_mode)

    def run_settings(self, template: str, image_folder: Path, max_new_tokens: int = 128) -> RunSettings:
        """Settings of a run; `max_new_tokens` applies if the flag is absent."""
        engine = self.engine
        limit = max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return RunSettings(
            model_path=engine.model_path if engine else "",
            model_id=self.model_name,
            template=template,
            params=replace(self.params, max_new_tokens=limit),
            image_folder=image_folder,
            num_workers=self.num_workers,
            resume=self.resume,
            overwrite=self.overwrite,
            quantization=engine.quantization if engine else None,
        )


def complete_args(parser: argparse.ArgumentParser, args: object) -> argparse.Namespace:
    """A namespace of the public attributes of `args`, completed by the parser's defaults."""
    given = {name: getattr(args, name) for name in dir(args) if not name.startswith("_")}
    return parser.parse_args([], argparse.Namespace(**given))
