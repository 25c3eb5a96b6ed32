"""A chat model from a base and published delta weights: `python -m llava.model.apply_delta --base-model-path B
--target-model-path T --delta-path D`.

base + delta in float32, cast once to the dtype that the delta's configuration names (else float16), and read back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.model import delta
from llava.model.checkpoint import inspect
from llava.model.source import WeightSource
from llava.utils import guarded


def apply_delta(base_path: str | Path, target_path: str | Path, delta_path: str | Path) -> torch.dtype:
    """Write base + delta to the new directory `target_path`; the dtype of the weights written."""
    found = inspect(delta_path)
    base, difference = WeightSource(Path(base_path)), WeightSource(found.path)
    delta.check_pair(base, difference)
    delta.check_differences(base, difference)
    dtype = delta.named_dtype(str(found.config.get("torch_dtype") or "float16"))

    def add(name: str, tensor: Tensor, below: Tensor | None) -> Tensor:
        return (tensor if below is None else delta.shifted(tensor, below, 1)).to(dtype)

    def verify(directory: Path) -> None:
        made = WeightSource(directory)
        for name, expected in delta.combine(base, difference, add):
            if not torch.equal(made.read(name), expected) or not bool(expected.isfinite().all()):
                raise CheckpointError(f"{name} was not written as base + delta in {dtype}; nothing was kept.")

    delta.write(found.path, target_path, delta.combine(base, difference, add), verify)
    return dtype


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = delta.parser(__doc__).parse_args(argv)
    dtype = apply_delta(args.base_model_path, args.target_model_path, args.delta_path)
    name = str(dtype).removeprefix("torch.")
    print(f"{args.target_model_path}: written in {name} and verified; try: llava check {args.target_model_path}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
