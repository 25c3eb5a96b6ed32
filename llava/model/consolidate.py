"""A checkpoint as one clean copy: `python -m llava.model.consolidate --src DIR --dst DIR [--yes]`.

Weights in float16 safetensors, tower included, tokenizer beside them, and a configuration of today: older ones call
themselves `llava` or `llama`, which other programs take for something else. The source is left as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.errors import CheckpointError, ConfigError
from llava.model import checkpoint as ckpt
from llava.model import delta
from llava.model.builder import read_config
from llava.model.check import language_parts
from llava.model.checkpoint import Kind
from llava.model.registry import language_model_spec
from llava.model.saving import write_config
from llava.model.source import WeightSource
from llava.utils import guarded


def current(config: dict[str, Any]) -> dict[str, Any]:
    """How a chat model's configuration names itself today; nothing for a language model's."""
    if "mm_vision_tower" not in config:
        return {}
    spec = language_model_spec(str(config.get("model_type")), "The configuration")
    return {"model_type": spec.config.model_type, "architectures": [spec.model.__name__]}


def needs_upgrade(config: dict[str, Any]) -> bool:
    """Whether a chat model's configuration names itself in an older way."""
    return any(config.get(key) != value for key, value in current(config).items())


def agreed(config: dict[str, Any]) -> bool:
    """Ask on the terminal whether to upgrade; without a terminal to ask on, `ConfigError`."""
    named = config.get("architectures") or ["no architecture"]
    was = f"{config.get('model_type')} / {', '.join(map(str, named)) if isinstance(named, list) else named}"
    try:
        answer = input(
            f"The configuration says {was}; the copy will say {current(config)['model_type']}. Continue? [Y/N] "
        )
    except EOFError as error:
        raise ConfigError(f"The configuration says {was} and needs an upgrade; pass --yes to agree to it.") from error
    return answer.strip().lower() in ("y", "yes")


def consolidate(src: str | Path, dst: str | Path, dtype: torch.dtype) -> None:
    """Write the copy to the new directory `dst`, its configuration upgraded, and verify it: shapes and values."""
    found = ckpt.inspect(src)
    if found.kind not in (Kind.FULL, Kind.LANGUAGE_MODEL):
        raise CheckpointError(f"{found.path} holds {found.kind.value}; only whole models can be consolidated.")
    source = WeightSource(found.path)

    def cast(name: str) -> Tensor:
        tensor = source.read(name).to(dtype)
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} has values that {dtype} cannot hold; pass --dtype bfloat16 or float32.")
        return tensor

    def tensors() -> Iterator[tuple[str, Tensor]]:
        return ((name, cast(name)) for name in source.shapes if delta.DROPPED not in name)

    def verify(directory: Path) -> None:
        settings = {**found.config, "torch_dtype": str(dtype).removeprefix("torch.")}
        write_config(directory, {**settings, **current(settings)})
        made = WeightSource(directory)
        if not all(torch.equal(made.read(name), tensor) for name, tensor in tensors()):
            raise CheckpointError(f"The copy of {found.path} reads back differently; nothing was kept.")
        made_here = ckpt.inspect(directory)
        language_parts(made_here, None, read_config(made_here))

    delta.write(found.path, dst, tensors(), verify)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", required=True, help="directory of the model")
    parser.add_argument("--dst", required=True, help="directory to make")
    parser.add_argument("--yes", action="store_true", help="upgrade an older configuration without asking")
    parser.add_argument("--dtype", default="float16", help="float16, bfloat16 or float32")
    args = parser.parse_args(argv)
    dtype = delta.named_dtype(args.dtype)
    config = ckpt.inspect(args.src).config
    if needs_upgrade(config) and not args.yes and not agreed(config):
        return 1
    consolidate(args.src, args.dst, dtype)
    print(f"{args.dst}: written and verified; try: llava check {args.dst}")  # noqa: T201 (a program)
    return 0


if __name__ == "__main__":
    sys.exit(main())
