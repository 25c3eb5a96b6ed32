"""Make a chat model from a base and published delta weights: `python -m llava.model.apply_delta --base-model-path BASE
--target-model-path TARGET --delta-path DELTA`.

The sum is computed in float32 and cast once, to the dtype in the configuration of the delta (default float16).
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
from llava.model.saving import WeightSource, write_checkpoint
from llava.placement import parse_dtype
from llava.utils import guarded


def apply_delta(base_model_path: str | Path, target_model_path: str | Path, delta_path: str | Path) -> torch.dtype:
    """Write base + delta to the new directory `target_model_path`, and return the dtype of its weights.

    Raises `CheckpointError` if the two directories do not belong together.
    """
    found = inspect(delta_path)
    base, difference = WeightSource(Path(base_model_path)), WeightSource(found.path)
    delta.check_pair(base, difference)
    delta.check_differences(base, difference)
    dtype = parse_dtype(str(found.config.get("torch_dtype") or found.config.get("dtype") or "float16"))

    def add(name: str, tensor: Tensor, below: Tensor | None) -> Tensor:
        return (tensor if below is None else delta.add_scaled(tensor, below, 1)).to(dtype)

    def verify(directory: Path) -> None:
        written = WeightSource(directory)
        for name, expected in delta.combine(base, difference, add):
            if not torch.equal(written.read(name), expected) or not bool(expected.isfinite().all()):
                raise CheckpointError(f"{name} is not base + delta in {dtype}, or not finite; nothing was kept.")

    write_checkpoint(found.path, target_model_path, delta.combine(base, difference, add), verify)
    return dtype


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = delta.make_parser(__doc__).parse_args(argv)
    dtype = apply_delta(args.base_model_path, args.target_model_path, args.delta_path)
    name = str(dtype).removeprefix("torch.")
    print(f"{args.target_model_path}: written in {name} and verified; try: llava check {args.target_model_path}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
