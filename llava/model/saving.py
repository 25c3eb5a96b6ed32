"""Write checkpoint directories, and read single tensors back by name."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from llava.errors import CheckpointError
from llava.files import apply_umask, atomic_directory, atomic_write
from llava.model.chat_template import chat_template_of
from llava.model.checkpoint import (
    INDEX_FILES,
    SINGLE_FILES,
    file_shapes,
    load_bin,
    read_json,
    require_once,
    stored_as,
    weight_files,
)
from llava.model.tokenizer import CONFIG, TEMPLATE

SHARD_BYTES: Final = 5 * 10**9
SIDE_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
)
T = TypeVar("T")


def savable_generation_config(config: GenerationConfig) -> GenerationConfig:
    """`config`, or a copy that samples: transformers does not save sampling settings without `do_sample` (Vicuna's)."""
    if config.do_sample or (config.temperature, config.top_p, config.top_k, config.typical_p) == (1.0, 1.0, 50, 1.0):
        return config
    config = copy.deepcopy(config)
    config.do_sample = True
    return config


class WeightSource:
    """Random access to the weights of the directory `path`; `.bin` shards are memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._bins: dict[Path, dict[str, Tensor]] = {}
        for file in weight_files(path):
            for name, shape in self._shapes(file).items():
                require_once(name, file, self._files)
                self.shapes[name] = shape

    def _shapes(self, file: Path) -> dict[str, tuple[int, ...]]:
        if file.suffix != ".bin":
            return file_shapes(file)
        self._bins[file] = load_bin(file)
        return {name: tuple(tensor.shape) for name, tensor in self._bins[file].items()}

    def read(self, name: str) -> Tensor:
        """The tensor `name`, which must be in `shapes`."""
        file = self._files[name]
        if file in self._bins:
            return self._bins[file][name]
        with safe_open(file, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor


def write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write named tensors as safetensors, one shard in memory at a time, with an index if there are several shards."""
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    size, total = 0, 0

    def flush() -> None:
        path = directory / f"shard-{len(shards)}"
        save_file(held, path, metadata={"format": "pt"})
        shards.append((path, sorted(held)))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if not held and not shards:
        raise CheckpointError(f"No weights to write into {directory}.")
    flush()
    if len(shards) == 1:
        shards[0][0].rename(directory / SINGLE_FILES[0])
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        file = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(file)
        weight_map.update(dict.fromkeys(names, file.name))
    write_json(directory / INDEX_FILES[0], {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tensors(file: Path, state: Mapping[str, Tensor]) -> None:
    """Write the small file `NAME.bin`, and the same weights to `NAME.safetensors`, each atomically."""
    safe, pickled = stored_as(file)
    safe.unlink(missing_ok=True)  # an interruption leaves one format, never two that differ
    with atomic_write(pickled) as part, part.open("wb") as opened:
        torch.save(dict(state), opened)
    with atomic_write(safe) as part:
        copies = {name: value.detach().clone().contiguous() for name, value in state.items()}
        save_file(copies, part, metadata={"format": "pt"})


@contextmanager
def replacing_weights(directory: Path) -> Iterator[None]:
    """Remove the file or index of an earlier save after a block that saves safetensors, and apply the umask to them.

    transformers leaves `model.safetensors` beside new shards, and an old index beside a new `model.safetensors`.
    """
    places = [directory / name for name in (SINGLE_FILES[0], INDEX_FILES[0])]

    def states() -> list[object]:
        found = [place.stat() if place.is_file() else None for place in places]
        return [state and (state.st_ino, state.st_mtime_ns, state.st_size) for state in found]

    before = states()
    yield
    written = [after is not None and after != old for old, after in zip(before, states())]
    for place, is_new in zip(places, written):
        if any(written) and not is_new:
            place.unlink(missing_ok=True)
    apply_umask(directory, "model*.safetensors")


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_chat_template(directory: Path) -> None:
    """Write the chat template for the `conv_template` in `config.json` to the tokenizer files of a directory."""
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    template = chat_template_of(config)
    if template is not None and any(directory.glob("tokenizer*")):
        settings = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
        write_json(directory / CONFIG, {**settings, "chat_template": template})
        (directory / TEMPLATE).unlink(missing_ok=True)  # newer libraries prefer it


def write_checkpoint(
    source: Path, output: str | Path, tensors: Iterable[tuple[str, Tensor]], verify: Callable[[Path], T]
) -> T:
    """Write `tensors` with the configuration, tokenizer and processor of `source` to the new directory `output`.

    The tokenizer gets the chat template of the configuration.

    Returns the result of `verify`, called with the temporary directory; if it raises, nothing is kept.
    """
    with atomic_directory(output) as directory:
        for pattern in SIDE_FILES:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, directory / file.name)
        write_chat_template(directory)
        write_weights(directory, tensors)
        return verify(directory)
