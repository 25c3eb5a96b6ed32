"""Rewrite a checkpoint in the current layout: `python -m llava.model.consolidate --src DIR --dst DIR [--yes]`.

The copy holds float16 safetensors (tower included), the tokenizer, and a configuration with the current `model_type`;
older ones use `llava` or `llama`, which other programs take for another model. The source is not changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llava.errors import CheckpointError, ConfigError
from llava.model import checkpoint as ckpt
from llava.model.builder import read_config
from llava.model.check import language_parts
from llava.model.checkpoint import Kind
from llava.model.config import read_settings
from llava.model.delta import DROPPED
from llava.model.registry import language_model_spec
from llava.model.saving import WeightSource, write_checkpoint, write_json
from llava.placement import parse_dtype
from llava.utils import guarded


def current_names(config: Mapping[str, object]) -> dict[str, object]:
    """The current `model_type` and `architectures` of a chat model's configuration; empty for a language model."""
    if "mm_vision_tower" not in config:
        return {}
    spec = language_model_spec(str(config.get("model_type")), "The configuration")
    return {"model_type": spec.config.model_type, "architectures": [spec.model.__name__]}


def needs_upgrade(config: Mapping[str, object]) -> bool:
    """Whether `config` has an older `model_type` or `architectures`."""
    return any(config.get(key) != value for key, value in current_names(config).items())


def confirm_upgrade(config: Mapping[str, object]) -> bool:
    """Ask on the terminal whether to upgrade. Raises `ConfigError` without a terminal."""
    names = config.get("architectures") or ["no architecture"]
    old = f"{config.get('model_type')} / {', '.join(map(str, names)) if isinstance(names, list) else names}"
    try:
        answer = input(
            f"The configuration says {old}; the copy will say {current_names(config)['model_type']}. Continue? [Y/N] "
        )
    except EOFError as error:
        raise ConfigError(f"The configuration says {old} and must be upgraded; pass --yes to confirm.") from error
    return answer.strip().lower() in ("y", "yes")


def consolidate_ckpt(src_path: str | Path, dst_path: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write the checkpoint `src_path` to the new directory `dst_path`, and compare the shapes and values written.

    Raises `CheckpointError` if `src_path` is not a whole model, or `dtype` cannot represent a weight.
    """
    found = ckpt.inspect(src_path)
    if found.kind not in (Kind.FULL, Kind.LANGUAGE_MODEL):
        raise CheckpointError(f"{found.path} holds {found.kind.value}; only whole models can be consolidated.")
    read_config(found)  # raises for settings that are not supported
    source = WeightSource(found.path)
    language_parts(found, None, read_config(found))  # raises for weights that do not fit

    def cast(name: str) -> Tensor:
        tensor = source.read(name).to(dtype)
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} has values out of the range of {dtype}; pass --dtype bfloat16 or float32.")
        return tensor

    def tensors() -> Iterator[tuple[str, Tensor]]:
        return ((name, cast(name)) for name in source.shapes if DROPPED not in name)

    def verify(directory: Path) -> None:
        config_class = language_model_spec(found.model_type, str(found.path)).config
        settings = read_settings(found.config, config_class, found.path)
        settings["torch_dtype"] = str(dtype).removeprefix("torch.")
        write_json(directory / "config.json", {**settings, **current_names(settings)})
        written = WeightSource(directory)
        if not all(torch.equal(written.read(name), tensor) for name, tensor in tensors()):
            raise CheckpointError(f"The copy of {found.path} differs from its source; nothing was kept.")
        copied = ckpt.inspect(directory)
        language_parts(copied, None, read_config(copied))

    write_checkpoint(found.path, dst_path, tensors(), verify)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", required=True, help="directory of the model")
    parser.add_argument("--dst", required=True, help="new directory for the copy")
    parser.add_argument("--yes", action="store_true", help="upgrade an older configuration without asking")
    parser.add_argument("--dtype", default="float16", help="float16, bfloat16 or float32")
    args = parser.parse_args(argv)
    dtype = parse_dtype(args.dtype)
    config = ckpt.inspect(args.src).config
    if needs_upgrade(config) and not args.yes and not confirm_upgrade(config):
        return 1
    consolidate_ckpt(args.src, args.dst, dtype=dtype)
    print(f"{args.dst}: written and verified; try: llava check {args.dst}")  # noqa: T201 (a program)
    return 0


if __name__ == "__main__":
    sys.exit(main())
