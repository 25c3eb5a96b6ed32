"""Any weight of a directory by its name, for tools that walk two directories together."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from llava.model.checkpoint import file_shapes, load_bin, weight_files


class WeightSource:
    """Random access to the weights of `path`; `.bin` shards are memory-mapped, safetensors read by tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._bins: dict[Path, dict[str, Tensor]] = {}
        for file in weight_files(path):
            for name, shape in self._shapes(file).items():
                self.shapes[name], self._files[name] = shape, file

    def _shapes(self, file: Path) -> dict[str, tuple[int, ...]]:
        if file.suffix != ".bin":
            return file_shapes(file)
        self._bins[file] = load_bin(file)
        return {name: tuple(tensor.shape) for name, tensor in self._bins[file].items()}

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, which must be in `shapes`."""
        file = self._files[name]
        if file in self._bins:
            return self._bins[file][name]
        with safe_open(file, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor
