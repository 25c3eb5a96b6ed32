"""Events recorded on a simulated GPU: uploads, downloads and hidden synchronisations, with source locations."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = str(ROOT / "llava") + "/"
LIBRARY = str(Path(torch.__file__).parent) + "/"
HELPERS = (PACKAGE + "placement.py", PACKAGE + "model/transfer.py")  # copies made here are attributed to the caller
HERE = (f"{ROOT}/tests/devices.py", f"{ROOT}/tests/cuda/events.py", f"{ROOT}/tests/cuda/kernels.py")

Kind = Literal["upload", "download", "sync", "wait", "peer"]
"""
upload: a copy of pinned host memory with `non_blocking`, for which the host does not wait.
download: values copied to the host: `.cpu()`, `.tolist()`, `.item()`, `bool()`, a copy into host memory.
sync: the host waits although no values were requested: a pageable upload, `nonzero`, a boolean index.
wait: an explicit `synchronize()` of a device, a stream or an event.
peer: a copy from one GPU to another.
"""

# Operators that read a count or a flag back from the device before they continue.
HIDDEN = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::multinomial",
    "aten::bincount",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}  # their result is a Python value
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


@dataclass(frozen=True)
class Place:
    """One event and the line that caused it: in `llava/`, or else in the caller outside torch."""

    kind: Kind
    file: str  # relative to the repository
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.file}:{self.line} ({self.what})"


class Events(list[Place]):
    """Events in the order in which they happened."""

    def of(self, kind: Kind) -> list[Place]:
        return [place for place in self if place.kind == kind]

    @property
    def uploads(self) -> list[Place]:
        return self.of("upload")

    @property
    def downloads(self) -> list[Place]:
        return self.of("download")

    @property
    def syncs(self) -> list[Place]:
        return self.of("sync")

    @property
    def waits(self) -> list[Place]:
        return self.of("wait")

    @property
    def peers(self) -> list[Place]:
        return self.of("peer")

    def table(self) -> str:
        """Equal events counted, the most frequent first: `print(events.table())`."""
        rows = [
            (str(count), place.kind, f"{place.file}:{place.line}", place.what)
            for place, count in Counter(self).most_common()
        ]
        rows = [("count", "kind", "place", "what"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def place(kind: Kind, what: str) -> Place:
    """An event at the current source location."""
    frame: Any = sys._getframe(1)
    outside = None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and file not in HELPERS:
            break
        if outside is None and not file.startswith(LIBRARY) and file not in HERE:
            outside = frame
        frame = frame.f_back
    found = frame or outside or sys._getframe(1)
    file = found.f_code.co_filename
    return Place(kind, file.removeprefix(f"{ROOT}/"), found.f_lineno, what)


def hidden_sync(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kind, str] | None:
    """The hidden synchronisation of an operator on simulated CUDA tensors, if any; copies are handled elsewhere."""
    name = func._schema.name
    if name in READS:
        return "download", name
    repeats = str(func) == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None
    if name in HIDDEN or repeats:
        return "sync", name
    if name not in INDEXED:
        return None
    indices = [index for index in args[1] if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        value = args[2] if len(args) > 2 else None
        if value is not None and value.numel() == 1 and value.device.type == "cpu" and len(indices) == 1:
            return None  # torch fills under the mask
        return "sync", f"{name} with a boolean mask"
    if any(index.device.type == "cpu" and index.numel() for index in indices):
        return "sync", f"{name} with indices from the host"
    return None
