"""Command-line arguments of the inference engine and of sampling, shared by every program that runs a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Final, Literal

from tqdm import tqdm

from llava.engine.sequence import SamplingParams
from llava.placement import ATTENTION, parse_size

if TYPE_CHECKING:
    from llava.engine.engine import Engine

_LOADING: Final = ("vision_tower", "num_gpus", "max_memory", "attn_implementation", "text_only")
_CACHES: Final = {
    "kv-cache-memory": "limit of the KV cache of running requests; others wait (default: 35 %% of the memory that is "
    "free after loading, or one full context if that is more, on CUDA; unlimited elsewhere)",
    "prefix-cache-memory": "limit of the prefix cache, 0 turns it off (default: 20 %% of the free memory on CUDA, else "
    "512MiB)",
    "feature-cache-memory": "limit of the image feature cache, 0 turns it off (default: 2 %% of the free memory, at "
    "most 2GiB, on CUDA, else 512MiB)",
}


@dataclass(frozen=True)
class EngineArgs:
    """Settings of an engine: the checkpoint, its placement and precision, image preprocessing, and memory limits.

    The fields are the flags of `add_cli_args`. Cache limits are bytes, None for the default of `cache_bounds`.
    """

    model_path: str
    model_base: str | None = None
    device: str | None = None
    dtype: str | None = None
    load_8bit: bool = False
    load_4bit: bool = False
    vision_tower: str | None = None
    num_gpus: int | None = None
    max_memory: str | None = None
    attn_implementation: str = "auto"
    text_only: bool = False
    kv_cache_memory: int | None = None
    prefix_cache_memory: int | None = None
    feature_cache_memory: int | None = None
    image_aspect_ratio: Literal["config", "pad", "crop"] = "config"
    max_batch_size: int = 16
    lora: Mapping[str, str] = field(default_factory=dict)  # directories of LoRA adapters by name

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
        """Add the flags that load a model; `required` makes `--model-path` mandatory."""
        add = parser.add_argument
        add("--model-path", required=required, help="checkpoint directory")
        add("--model-base", help="base language model of a projector or LoRA checkpoint")
        add("--device", help="cuda, cuda:N, mps or cpu (default: the best available)")
        add("--dtype", help="float32, float16 or bfloat16 (default: float32 on CPU, else 16 bit)")
        add("--load-8bit", action="store_true", help="quantize the language model to 8 bit")
        add("--load-4bit", action="store_true", help="quantize the language model to 4 bit")
        add("--vision-tower", help="vision tower to use instead of the checkpoint's")
        add("--num-gpus", type=int, help="split the weights over the first N GPUs (default: as few as hold them)")
        add(
            "--max-memory", help="memory for weights: 20GiB per GPU, or 0=10GiB,1=20GiB (default: most of what is free)"
        )
        add("--attn-implementation", "--attn_implementation", choices=ATTENTION, default="auto")
        add("--text-only", action="store_true", help="load a language model, or an adapter of one, without a tower")
        for name, text in _CACHES.items():
            add(f"--{name}", type=_size, metavar="SIZE", help=f"such as 8GiB: {text}")
        add(
            "--image-aspect-ratio",
            choices=("config", "pad", "crop"),
            default="config",
            help="pad images to a square, or crop the centre (default: as the checkpoint was trained)",
        )

    @staticmethod
    def add_lora_arg(parser: argparse.ArgumentParser) -> None:
        """Add `--lora`, for programs whose requests name an adapter."""
        text = "serve the LoRA adapter of directory DIR beside the model, as model NAME; repeatable"
        parser.add_argument("--lora", action=_AddLora, default={}, metavar="NAME=DIR", help=text)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace, *, max_batch_size: int = 16) -> EngineArgs:
        """Settings from the parsed flags of `add_cli_args`; absent flags keep their defaults."""
        given = {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
        return cls(**{**given, "max_batch_size": max_batch_size})

    @property
    def quantization(self) -> str | None:
        """ "8 bit", "4 bit", or None."""
        return "8 bit" if self.load_8bit else "4 bit" if self.load_4bit else None

    def build_engine(self, progress: Callable[[float], None] | None = None) -> Engine:
        """Load the checkpoint into an engine.

        `progress` is called with the fraction of the weights loaded so far; without it, a progress bar is shown on a
        terminal.
        """
        from llava.engine.engine import load_engine

        if progress is None:
            line = "weights read: {percentage:3.0f} %|{bar:30}|"
            with tqdm(total=1.0, bar_format=line, disable=None, leave=False) as bar:
                return self.build_engine(lambda fraction: bar.update(fraction - bar.n))
        return load_engine(
            self.model_path,
            self.model_base,
            device=self.device,
            dtype=self.dtype,
            load_8bit=self.load_8bit,
            load_4bit=self.load_4bit,
            max_batch_size=self.max_batch_size,
            image_aspect_ratio=None if self.image_aspect_ratio == "config" else self.image_aspect_ratio,
            kv_cache_bytes=self.kv_cache_memory,
            prefix_cache_bytes=self.prefix_cache_memory,
            feature_cache_bytes=self.feature_cache_memory,
            lora=self.lora,
            loading={**{name: getattr(self, name) for name in _LOADING}, "progress": progress},
        )


def add_conv_mode_arg(parser: argparse.ArgumentParser) -> None:
    """Add `--conv-mode`, the conversation template."""
    parser.add_argument("--conv-mode", help="conversation template (default: the one the checkpoint was trained with)")


def add_sampling_args(parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int | None) -> None:
    """Add the flags of `sampling_params`."""
    add = parser.add_argument
    add("--temperature", type=float, default=temperature, help="0 decodes greedily (default %(default)s)")
    add("--top_p", "--top-p", type=float, default=None, help="nucleus sampling (default: off)")
    add("--num_beams", "--num-beams", type=int, default=1, help="beam search if above 1 (default %(default)s)")
    add("--max-new-tokens", "--max_new_tokens", type=int, default=max_new_tokens, help="length limit of an answer")
    add("--seed", type=int, default=0, help="seed of sampled answers (default %(default)s)")


def sampling_params(args: argparse.Namespace, max_new_tokens: int = 128) -> SamplingParams:
    """Sampling parameters from the flags of `add_sampling_args`; `max_new_tokens` applies where its flag is absent."""
    return SamplingParams(
        max_new_tokens=max_new_tokens if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_p=1.0 if args.top_p is None else args.top_p,
        seed=args.seed,
        num_beams=args.num_beams,
    )


class _AddLora(argparse.Action):
    """Adds NAME=DIR to a mapping."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: object, option: str | None = None
    ) -> None:
        known: dict[str, str] = getattr(namespace, self.dest)
        name, _, directory = str(value).partition("=")
        if not name or not directory or name in known:
            problem = "is given twice" if name in known else "must be NAME=DIR"
            raise argparse.ArgumentError(self, f"{value!r} {problem}")
        setattr(namespace, self.dest, {**known, name: directory})


def _size(text: str) -> int:
    size = parse_size(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 8GiB or 512MiB, got {text!r}")
    return size
