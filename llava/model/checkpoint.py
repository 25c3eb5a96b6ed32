"""Kind of a checkpoint directory, from its files alone, and safe reading of its weights.

Weights are read tensor by tensor; `weight_files` decides from which files, for every program. `.bin` files are opened
with `weights_only=True`, which refuses pickles that contain code.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from llava.model.weight_sets import TensorReader, WeightSet, choose

PROJECTOR_FILE = "mm_projector.bin"  # `read_tensors` and `write_tensors` add a .safetensors of the same name
NON_LORA_FILE = "non_lora_trainables.bin"
ADAPTER_CONFIG = "adapter_config.json"
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_FILES = tuple(name for both in zip(SINGLE_FILES, INDEX_FILES) for name in both)  # in order of precedence
FORMATS = (".safetensors", ".bin")
MANY_LAYERS = 1000
REMAP_BYTES, COPIED_BYTES = 16 * 2**20, 2**20
LFS_POINTER, ZIP, PICKLE = b"version https://git-lfs", b"PK\x03\x04", b"\x80"  # first bytes of files
CORES = ("model.", "transformer.")  # LLaMA, MPT
TOWER_PREFIXES = tuple(core + "vision_tower.vision_tower." for core in CORES)
PROJECTOR_PREFIXES = tuple(core + "mm_projector." for core in CORES)
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
FINAL_NORMS = ("model.norm.weight", "transformer.norm_f.weight")


class Kind(str, Enum):
    """Kind of a directory; the value is the phrase of messages."""

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
    """A directory, its kind, and its parsed `config.json` (empty without one)."""

    path: Path
    kind: Kind
    config: dict[str, Any]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that `config.json` names: `torch_dtype`, or `dtype` as of transformers 5."""
        named = str(self.config.get("torch_dtype") or self.config.get("dtype")).removeprefix("torch.")
        return value if isinstance(value := getattr(torch, named, None), torch.dtype) else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `CheckpointError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must contain a JSON object, got a {type(value).__name__}; download it again.")
    return value


@contextmanager
def config_errors(source: str | Path) -> Iterator[None]:
    """Turn errors of creating a model from the settings of `source` into `CheckpointError`."""
    try:
        yield
    except LlavaError:
        raise
    except Exception as error:  # libraries raise errors of any type for invalid settings
        raise CheckpointError(
            f"The configuration of {source} is invalid ({type(error).__name__}: {error}); compare its config.json with "
            "that of the published model."
        ) from error


def require_directory(path: str | Path) -> Path:
    """Return the path of a readable directory; raises `CheckpointError` for anything else."""
    if not os.path.isdir(path):  # noqa: PTH112 (Path.is_dir() raises below an unreadable directory)
        raise CheckpointError(f"There is no directory {str(path)!r}; check the path, or download the checkpoint first.")
    if not os.access(path, os.R_OK | os.X_OK):
        raise CheckpointError(f"cannot read {path}: permission denied; change its permissions.")
    return Path(path)


def inspect(path: str | Path) -> Checkpoint:
    """Determine the kind of a local directory from its files; raises `CheckpointError` if it does not exist."""
    path = require_directory(path)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"model_type in {path}/config.json must be a string, got {config['model_type']!r}.")
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
        return Kind.FULL if has_weights(path) else Kind.PROJECTOR if has_tensors(path / PROJECTOR_FILE) else Kind.EMPTY
    if model_type in LANGUAGE_MODELS:
        return Kind.LANGUAGE_MODEL
    return Kind.OTHER if model_type else Kind.EMPTY


def has_weights(path: Path) -> bool:
    return any((path / name).is_file() for name in WEIGHT_FILES)


def weight_files(path: Path) -> list[Path]:
    """The weight files of a directory, or a file itself.

    A directory may hold several sets: `model.safetensors`, the shards of `model.safetensors.index.json`,
    `pytorch_model.bin`, and the shards of `pytorch_model.bin.index.json`. The first complete one in this order, that of
    transformers, is read. Raises `CheckpointError` if none is complete, or if another set holds different weights.
    """
    if os.path.isfile(path):  # noqa: PTH113 (as in require_directory)
        return [path]
    path = require_directory(path)
    sets = [_weight_set(path / name) for name in WEIGHT_FILES if (path / name).is_file()]
    if not sets:
        raise CheckpointError(f"{path} holds no weights (none of {', '.join(WEIGHT_FILES)}); download it again.")
    return list(_choose(path, sets, _lazy_tensors).files)


def _weight_set(file: Path) -> WeightSet:
    files = tuple(file.with_name(name) for name in (_shards(file) if file.suffix == ".json" else [file.name]))
    return WeightSet(file.name, files, tuple(one.name for one in files if _is_absent(one)))


def _choose(path: Path, sets: list[WeightSet], read: TensorReader, *, whole: bool = False) -> WeightSet:
    """The first complete one of `sets`; raises `CheckpointError` if there is none, or another one differs from it."""
    chosen = choose(path, sets, read, whole=whole)
    if chosen is not None:
        return chosen
    first = sets[0]
    damaged = next((file for file in first.files if file.is_file() and _is_absent(file)), None)
    if damaged is not None:
        raise unreadable(damaged, ValueError("it is empty"))
    raise CheckpointError(
        f"{path / first.name} lists {', '.join(first.missing) or 'no shards'}, missing in {path}; the download is "
        "incomplete, run it again."
    )


def stored_as(file: Path) -> list[Path]:
    """The files that may hold the weights of `NAME.bin` or `NAME.safetensors`, in order of precedence."""
    return [file.with_suffix(suffix) for suffix in FORMATS] if file.suffix in FORMATS else [file]


def has_tensors(file: Path) -> bool:
    """Whether `file` exists in one of its formats, see `stored_as`."""
    return any(one.is_file() for one in stored_as(file))


def tensor_file(file: Path) -> Path:
    """The file to read for the small file `file`, such as `mm_projector.bin`: safetensors first.

    Raises `CheckpointError` if it exists in neither format, or if the two formats hold different weights.
    """
    sets = [_weight_set(one) for one in stored_as(file) if one.is_file()]
    if not sets:
        raise CheckpointError(f"There is no file {str(file)!r}; check the path.")
    return _choose(file.parent, sets, _tensors, whole=True).files[0]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The weights of a small file, see `tensor_file`."""
    return dict(_tensors(tensor_file(file)))


def _tensors(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterable[tuple[str, Tensor]]:
    """The `wanted` weights of a file."""
    if file.suffix == ".safetensors":
        return _safetensors(file, wanted)
    return ((name, tensor) for name, tensor in load_bin(file).items() if wanted(name))


def _lazy_tensors(file: Path) -> Iterable[tuple[str, Tensor]]:
    """The weights of a file, memory-mapped; raises `CheckpointError` if it would have to be read whole."""
    if file.suffix != ".safetensors" and not _is_zip(file):
        raise CheckpointError(f"{file} was saved by PyTorch before 1.6 and is not compared with other files.")
    return _tensors(file)


def _shards(index: Path) -> list[str]:
    """The files of an index."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) and Path(f).name == f for f in where.values()):
        raise CheckpointError(
            f"weight_map in {index} must map weights to files of the same directory; download it again."
        )
    return sorted(set(where.values()))


def _is_absent(file: Path) -> bool:
    return not file.is_file() or file.stat().st_size == 0 or _begin(file).startswith(LFS_POINTER)


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """The `CheckpointError` for a weight file that raised `error`."""
    if _begin(file).startswith(LFS_POINTER):
        return CheckpointError(f"{file} is a Git LFS pointer, not the weights; run git lfs pull in {file.parent}.")
    return CheckpointError(
        f"cannot read {file} ({str(error) or type(error).__name__}): it is damaged or unreadable for this user; "
        "download it again, or change its permissions."
    )


def load_bin(path: Path) -> dict[str, Tensor]:
    """Load a dictionary of tensors from a PyTorch file, memory-mapped if possible; refuses pickled code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        if not _begin(path).startswith((ZIP, PICKLE)):
            raise unreadable(path, error) from error
        raise CheckpointError(
            f"{path} contains more than tensors (a pickle that would run code) and is refused; use safetensors, or "
            "weights from a trusted source."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise unreadable(path, error) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} must contain a dictionary of tensors; download it again.")
    for name, value in state.items():
        _require_float(path, name, value.is_floating_point())
    return state


def _require_float(file: Path, name: str, is_float: bool) -> None:
    """Raise `CheckpointError` for a weight of integers, which is quantized; buffers may be integers."""
    if not is_float and name.endswith((".weight", ".bias")):
        raise CheckpointError(
            f"{name} in {file} is not floating-point: the weights are quantized; pass the unquantized checkpoint."
        )


def _is_zip(path: Path) -> bool:
    return _begin(path).startswith(ZIP)


def _begin(path: Path) -> bytes:
    """The first bytes of a file; empty if it cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER))
    except OSError:
        return b""


def reads_lazily(path: Path) -> bool:
    """Whether single weights can be read; `.bin` files of PyTorch before 1.6 must be read whole."""
    return all(file.suffix == ".safetensors" or _is_zip(file) for file in weight_files(path))


_COUNT: Final[ContextVar[Callable[[int], None] | None]] = ContextVar("count", default=None)


@contextmanager
def progress_of(
    shapes: Callable[[], Mapping[str, tuple[int, ...]]], progress: Callable[[float], None] | None
) -> Iterator[None]:
    """Call `progress` after each weight read with the fraction of the parameters in `shapes` read so far."""
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


def iter_tensors(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name, tensor)` of the `wanted` weights of a directory or file; others are not read."""
    count = _COUNT.get()
    for name, tensor in _stored(path, wanted):
        read = tensor.numel()
        yield name, tensor
        del tensor  # free it before the next is read
        if count is not None:
            count(read)


def _stored(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    seen: dict[str, Path] = {}
    for file in weight_files(path):
        for name, tensor in _tensors(file, wanted):
            require_once(name, file, seen)
            yield name, tensor
            del tensor


def require_once(name: str, file: Path, seen: dict[str, Path]) -> None:
    """Record in `seen` that `name` is in `file`; raises `CheckpointError` if it is in another shard, too."""
    if name in seen:
        raise CheckpointError(
            f"{name} is stored twice, in {seen[name]} and {file.name}: shards of different saves are mixed; download "
            "the directory again."
        )
    seen[name] = file


def _safetensors(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one file in file order.

    A tensor keeps the memory mapping it was read from alive, with all pages read through it. The mapping is therefore
    renewed regularly and small tensors are copied, so that a caller that converts large tensors does not hold the file.
    """
    try:
        with safe_open(file, framework="np") as header:
            names = list(header.offset_keys() if hasattr(header, "offset_keys") else header.keys())
        shard: Any = None
        mapped = 0
        for name in filter(wanted, names):
            if shard is None or mapped > REMAP_BYTES:
                shard, mapped = safe_open(file, framework="pt"), 0
            tensor: Tensor = shard.get_tensor(name)
            _require_float(file, name, tensor.is_floating_point())
            mapped += tensor.nbytes
            yield name, tensor.clone() if tensor.nbytes < COPIED_BYTES else tensor
    except (SafetensorError, OSError, RuntimeError) as error:
        raise unreadable(file, error) from error


def file_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a weight file; only the header of safetensors is read."""
    if file.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in load_bin(file).items()}
    try:
        with safe_open(file, framework="np") as shard:  # numpy does not map the whole file
            slices = {name: shard.get_slice(name) for name in list(shard.keys())}
            for name, part in slices.items():
                _require_float(file, name, part.get_dtype().startswith(("F", "BF")))
            return {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a directory or file."""
    seen: dict[str, Path] = {}
    shapes = {}
    for file in weight_files(path):
        for name, shape in file_shapes(file).items():
            require_once(name, file, seen)
            shapes[name] = shape
    return shapes


def check_depth(layers: object, path: Path) -> None:
    """Refuse a configuration with more layers than `path` has weights, before the model is created."""
    if isinstance(layers, int) and layers > MANY_LAYERS and layers > len(weights := weight_shapes(path)):
        raise CheckpointError(
            f"The configuration has {layers} layers, but {path} holds {len(weights)} weights; compare its config.json "
            "with that of the published model."
        )


def projector_state(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The weights of a projector file below `mm_projector.`; raises `CheckpointError` without any."""
    found = {name.split("mm_projector.", 1)[1]: value for name, value in state.items() if "mm_projector." in name}
    if not found:
        raise CheckpointError(
            f"{source} holds no 'mm_projector.' weights, but {', '.join(sorted(state)[:3])}; pass another."
        )
    return found


def compare_shapes(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], source: Path) -> None:
    """Raise `CheckpointError` for projector weights of different shapes than the configured projector's."""
    if found != wanted:
        raise CheckpointError(
            f"{source} does not fit the configured projector: the file has {_describe(found)}, the configuration "
            f"requires {_describe(wanted)}; check mm_projector_type, the tower and the base model."
        )


def _describe(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items()))


def layer_index(name: str, prefix: str) -> int | None:
    """The number `i` of a key `{prefix}{i}.…`, or `None`."""
    match = re.match(re.escape(prefix) + r"(\d+)\.", name)
    return int(match.group(1)) if match else None
