"""Command-line arguments of the inference engine and of sampling, shared by every program that runs a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from tqdm import tqdm

from llava.engine.sequence import SamplingParams
from llava.placement import ATTENTION, parse_size
from llava.utils import CliArgs, flag

if TYPE_CHECKING:
    from llava.engine.engine import Engine
    from llava.engine.token_budget import TokenLimit

_LOADING: Final = ("vision_tower", "num_gpus", "max_memory", "attn_implementation", "text_only")


def _size(text: str) -> int:
    size = parse_size(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 8GiB or 512MiB, got {text!r}")
    return size


def _cache(text: str) -> int | None:
    return flag(None, f"such as 8GiB: {text}", type=_size, metavar="SIZE")


@dataclass(frozen=True)
class EngineArgs(CliArgs):
    """Settings of an engine: the checkpoint, its placement and precision, image preprocessing, and memory limits.

    Cache limits are bytes, None for the default of `cache_bounds`.
    """

    model_path: str
    model_base: str | None = flag(None, "base language model of a projector or LoRA checkpoint")
    device: str | None = flag(None, "cuda, cuda:N, mps or cpu (default: the best available)")
    dtype: str | None = flag(None, "float32, float16 or bfloat16 (default: float32 on CPU, else 16 bit)")
    load_8bit: bool = flag(False, "quantize the language model to 8 bit")
    load_4bit: bool = flag(False, "quantize the language model to 4 bit")
    vision_tower: str | None = flag(None, "vision tower to use instead of the checkpoint's")
    num_gpus: int | None = flag(
        None, "split the weights over the first N GPUs (default: as few as hold them)", type=int
    )
    max_memory: str | None = flag(
        None, "memory for weights: 20GiB per GPU, or 0=10GiB,1=20GiB (default: most of what is free)"
    )
    attn_implementation: str = flag(
        "auto", "attention of the language model (default %(default)s)", "--attn_implementation", choices=ATTENTION
    )
    text_only: bool = flag(False, "load a language model, or an adapter of one, without a tower")
    kv_cache_memory: int | None = _cache(
        "limit of the KV cache of running requests; others wait (default: 35 %% of the memory that is free after "
        "loading, or one full context if that is more, on CUDA; unlimited elsewhere)"
    )
    prefix_cache_memory: int | None = _cache(
        "limit of the prefix cache, 0 turns it off (default: 20 %% of the free memory on CUDA, else 512MiB)"
    )
    feature_cache_memory: int | None = _cache(
        "limit of the image feature cache, 0 turns it off (default: 2 %% of the free memory, at most 2GiB, on CUDA, "
        "else 512MiB)"
    )
    image_aspect_ratio: Literal["config", "pad", "crop"] = flag(
        "config", "pad images to a square, or crop the centre (default: as the checkpoint was trained)",
        choices=("config", "pad", "crop"),
    )  # fmt: skip
    max_batch_size: int = 16
    max_num_batched_tokens: TokenLimit = None
    lora: Mapping[str, str] = field(default_factory=dict)  # directories of LoRA adapters by name

    @staticmethod
    def add_lora_arg(parser: argparse.ArgumentParser) -> None:
        """Add `--lora`, for programs whose requests name an adapter."""
        text = "serve the LoRA adapter of directory DIR beside the model, as model NAME; repeatable"
        parser.add_argument("--lora", action=_AddLora, default={}, metavar="NAME=DIR", help=text)

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser, *, required: bool = True) -> None:
        """Add the flags that load a model; `required` makes `--model-path` mandatory."""
        parser.add_argument("--model-path", required=required, help="checkpoint directory")
        super().add_cli_args(parser)

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
            max_num_batched_tokens=self.max_num_batched_tokens,
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


def token_limit(text: str) -> TokenLimit:
    """Argument type of `--max-num-batched-tokens`: "auto", or a number of tokens."""
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f'expected a number of tokens, at least 1, or "auto", got {text!r}')
    return "auto" if text == "auto" else int(text)


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
