"""What a directory of weights is, and reading it safely: files decide, never the folder's name (spec/model.md §11.2).

Weights are read tensor by tensor, safetensors first; `.bin` files are opened with `weights_only=True`, so a pickle
that carries code is refused.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.errors import CheckpointError, LlavaError
from llava.model.registry import LANGUAGE_MODELS, TOWERS, tower_type

PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
ADAPTER_CONFIG = "adapter_config.json"
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
MANY_LAYERS = 1000
REMAP_BYTES, COPIED_BYTES = 16 * 2**20, 2**20
LFS_POINTER, ZIP, PICKLE = b"version https://git-lfs", b"PK\x03\x04", b"\x80"  # how files begin
CORES = ("model.", "transformer.")  # of LLaMA, of MPT
TOWER_PREFIXES = tuple(core + "vision_tower.vision_tower." for core in CORES)
PROJECTOR_PREFIXES = tuple(core + "mm_projector." for core in CORES)
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
FINAL_NORMS = ("model.norm.weight", "transformer.norm_f.weight")


class Kind(str, Enum):
    """What a directory holds; the value is the phrase used in messages."""

    FULL = "a full chat checkpoint"
    PROJECTOR = "a projector-only checkpoint"
    LORA = "a LoRA adapter"
    LANGUAGE_MODEL = "a text-only language model"
    TOWER = "a vision tower"
    HF_LLAVA = "a LLaVA checkpoint in the Hugging Face layout (LlavaForConditionalGeneration)"
    INTERNVL_CHAT = "an InternVL 1.1 or newer checkpoint (internvl_chat)"
    OTHER = "a model of another architecture"
    EMPTY = "no checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A directory, what it is, and its parsed `config.json` (empty when there is none)."""

    path: Path
    kind: Kind
    config: dict[str, Any]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` names the file when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, but holds a {type(value).__name__}.")
    return value


@contextmanager
def config_errors(source: str | Path) -> Iterator[None]:
    """Inside, a model is made of the settings of `source`; what they cannot describe is a `CheckpointError`."""
    try:
        yield
    except LlavaError:
        raise
    except Exception as error:  # what the libraries raise for absurd settings is of every type, assertions included
        raise CheckpointError(
            f"The configuration of {source} describes no model that can be made ({type(error).__name__}: {error}); "
            "compare its config.json with that of the same model elsewhere."
        ) from error


def require_directory(path: str | Path) -> Path:
    """The path of a directory that can be looked into; anything else is a `CheckpointError`."""
    if not os.path.isdir(path):  # noqa: PTH112 (Path.is_dir() raises below a directory of someone else's)
        raise CheckpointError(f"There is no directory {str(path)!r}; check the path, or download the checkpoint first.")
    if not os.access(path, os.R_OK | os.X_OK):
        raise CheckpointError(f"{path} cannot be looked into by this user; see to the rights.")
    return Path(path)


def inspect(path: str | Path) -> Checkpoint:
    """Tell what a local directory is, by its files alone. A path that does not exist is a `CheckpointError`."""
    path = require_directory(path)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"{path}/config.json has a model_type that is no name: {config['model_type']!r}.")
    return Checkpoint(path, _kind(path, config), config)


def _kind(path: Path, config: dict[str, Any]) -> Kind:
    model_type = config.get("model_type", "")
    if (path / ADAPTER_CONFIG).is_file():
        return Kind.LORA
    if model_type == "internvl_chat":
        return Kind.INTERNVL_CHAT
    if model_type == "llava" and "mm_vision_tower" not in config:
        return Kind.HF_LLAVA
    if tower_type(config) in TOWERS:
        return Kind.TOWER
    if "mm_vision_tower" in config and model_type in LANGUAGE_MODELS:
        return Kind.FULL if has_weights(path) else Kind.PROJECTOR if (path / PROJECTOR_FILE).is_file() else Kind.EMPTY
    if model_type in LANGUAGE_MODELS:
        return Kind.LANGUAGE_MODEL
    return Kind.OTHER if model_type else Kind.EMPTY


def has_weights(path: Path) -> bool:
    return any((path / name).is_file() for name in (*INDEX_FILES, *SINGLE_FILES))


def weight_files(path: Path) -> list[Path]:
    """The files that hold the model's weights, safetensors first; a shard that an index names must exist."""
    if os.path.isfile(path):  # noqa: PTH113 (as in require_directory)
        return [path]
    path = require_directory(path)
    for name, single in zip(INDEX_FILES, SINGLE_FILES):
        if (path / name).is_file():
            shards = _shards(path / name)
            missing = [shard for shard in shards if not (path / shard).is_file()]
            if missing or not shards:
                raise CheckpointError(
                    f"{path / name} lists {', '.join(missing) or 'no shards'}, which {path} does not hold; "
                    "the download is incomplete, run it again."
                )
            return [path / shard for shard in shards]
        if (path / single).is_file():
            return [path / single]
    raise CheckpointError(f"{path} holds no weights (none of {', '.join(INDEX_FILES + SINGLE_FILES)}).")


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) and Path(f).name == f for f in where.values()):
        raise CheckpointError(
            f"{index} should map weights to files beside it under weight_map, and does not; download it again."
        )
    return sorted(set(where.values()))


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """What to say of a file of weights that could not be opened for `error`."""
    if _begin(file).startswith(LFS_POINTER):
        return CheckpointError(
            f"{file} is a pointer of Git LFS and not the weights; run git lfs pull in {file.parent}."
        )
    return CheckpointError(
        f"{file} cannot be read ({str(error) or type(error).__name__}): it is damaged, or belongs to another user; "
        "download it again, or see to its rights."
    )


def load_bin(path: Path) -> dict[str, Tensor]:
    """A dictionary of tensors from a PyTorch file, memory-mapped where its format allows; code in it is refused."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        if not _begin(path).startswith((ZIP, PICKLE)):
            raise unreadable(path, error) from error
        raise CheckpointError(
            f"{path} holds more than tensors (a pickle that would run code) and is refused; "
            "get the weights as safetensors, or from a source you trust."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise unreadable(path, error) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} should hold a dictionary of tensors, and does not.")
    return state


def _is_zip(path: Path) -> bool:
    return _begin(path).startswith(ZIP)


def _begin(path: Path) -> bytes:
    """The first bytes of a file, none of one that cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER))
    except OSError:
        return b""


def reads_lazily(path: Path) -> bool:
    """Whether single weights can be read; `.bin` files of PyTorch before 1.6 are read whole."""
    return all(file.suffix == ".safetensors" or _is_zip(file) for file in weight_files(path))


_COUNT: Final[ContextVar[Callable[[int], None] | None]] = ContextVar("count", default=None)


@contextmanager
def progress_of(
    shapes: Callable[[], Mapping[str, tuple[int, ...]]], progress: Callable[[float], None] | None
) -> Iterator[None]:
    """Inside, `progress` is told, after each weight that is read, how much of all `shapes` has been: 0 to 1."""
    if progress is None:
        yield
        return
    total, read = sum(map(math.prod, shapes().values())), 0

    def count(parameters: int) -> None:
        nonlocal read
        read += parameters
        progress(min(1.0, read / total))

    token = _COUNT.set(count)
    try:
        yield
    finally:
        _COUNT.reset(token)
    progress(1.0)


def iter_tensors(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | None]]:
    """`(name, tensor)` of every weight in a directory, one shard at a time; unwanted ones come as `None`, unread."""
    count = _COUNT.get()
    for name, tensor in _stored(path, wanted):
        read = 0 if tensor is None else tensor.numel()
        yield name, tensor
        del tensor  # before the next one is read
        if count is not None:
            count(read)


def _stored(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | None]]:
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            yield from _safetensors(file, wanted)
        else:
            for name, tensor in load_bin(file).items():
                yield name, tensor if wanted(name) else None


def _safetensors(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | None]]:
    """The tensors of one file, in the order they lie in it.

    What was read stays in memory as long as its mapping of the file does, and a tensor that is kept keeps its mapping.
    So there is a new one every so often, and small tensors are copies: who packs the large ones never holds the file.
    """
    try:
        with safe_open(file, framework="np") as header:
            names = list(header.offset_keys() if hasattr(header, "offset_keys") else header.keys())
        shard: Any = None
        mapped = 0
        for name in names:
            if not wanted(name):
                yield name, None
                continue
            if shard is None or mapped > REMAP_BYTES:
                shard, mapped = safe_open(file, framework="pt"), 0
            tensor: Tensor = shard.get_tensor(name)
            mapped += tensor.nbytes
            yield name, tensor.clone() if tensor.nbytes < COPIED_BYTES else tensor
    except (SafetensorError, OSError, RuntimeError) as error:
        raise unreadable(file, error) from error


def file_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a file of weights; of safetensors, only the header is read."""
    if file.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in load_bin(file).items()}
    try:
        with safe_open(file, framework="np") as shard:  # numpy's does not map the whole file
            return {name: tuple(shard.get_slice(name).get_shape()) for name in list(shard.keys())}
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight in a directory, without reading the weights."""
    return {name: shape for file in weight_files(path) for name, shape in file_shapes(file).items()}


def check_depth(layers: Any, path: Path) -> None:
    """Refuse, before a model of them is made, more layers than `path` has weights; ordinary numbers cost nothing."""
    if isinstance(layers, int) and layers > MANY_LAYERS and layers > len(weights := weight_shapes(path)):
        raise CheckpointError(
            f"A configuration asks for {layers} layers, but {path} holds {len(weights)} weights; compare its "
            "config.json with that of the same model elsewhere."
        )


def projector_state(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The part of a projector file below `mm_projector.`; a file without any is a `CheckpointError` (§9)."""
    found = {name.split("mm_projector.", 1)[1]: value for name, value in state.items() if "mm_projector." in name}
    if not found:
        raise CheckpointError(f"{source} holds no 'mm_projector.' weights, but {', '.join(sorted(state)[:3])}.")
    return found


def compare_shapes(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], source: Path) -> None:
    """Refuse projector weights that do not fit, with both sides in the message."""
    if found != wanted:
        raise CheckpointError(
            f"{source} does not fit the configured projector: the file has {_describe(found)}, "
            f"the configuration asks for {_describe(wanted)}; check mm_projector_type, the tower and the base model."
        )


def _describe(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items()))


def layer_index(name: str, prefix: str) -> int | None:
    """The `i` of a key `{prefix}{i}.…`, or `None`."""
    match = re.match(re.escape(prefix) + r"(\d+)\.", name)
    return int(match.group(1)) if match else None
