"""Weights to publish where a base may not be: `python -m llava.model.make_delta --base-model-path B
--target-model-path T --delta-path D [--hub-repo-id R]`.

The delta is kept in float16, as published ones are; what this costs is measured by applying it, and printed. With
`--dtype float32` nothing is lost. The tokenizer and configuration are the target's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.model import delta
from llava.model.source import WeightSource
from llava.utils import guarded


def make_delta(base_path: str | Path, target_path: str | Path, delta_path: str | Path, dtype: torch.dtype) -> float:
    """Write target - base to the new directory `delta_path`; the largest error that applying it leaves.

    `CheckpointError` when the directories do not belong together, or a difference is too large for `dtype`.
    """
    base, target = WeightSource(Path(base_path)), WeightSource(Path(target_path))
    delta.check_pair(base, target)

    def subtract(name: str, tensor: Tensor, below: Tensor | None) -> Tensor:
        return tensor if below is None else delta.shifted(tensor, below, -1).to(dtype)

    def verify(directory: Path) -> float:
        made, worst = WeightSource(directory), 0.0
        for name, below in ((name, base.read(name)) for name in made.shapes if name in base.shapes):
            wanted, difference = target.read(name).float(), made.read(name)
            error = float((delta.shifted(difference, below, 1) - wanted).abs().max())
            # One rounding of the difference in `dtype`, and one of the sum in float32.
            size = float(difference.abs().max()), float(wanted.abs().max())
            allowed = torch.finfo(dtype).eps * size[0] + torch.finfo(torch.float32).eps * (size[0] + 2 * size[1]) + 1e-7
            if not (math.isfinite(error) and error <= allowed):
                raise CheckpointError(
                    f"The delta of {name} does not restore it (error {error:.3g}); make it with --dtype float32."
                )
            worst = max(worst, error)
        return worst

    worst: float = delta.write(target.path, delta_path, delta.combine(base, target, subtract), verify)
    return worst


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = delta.parser(__doc__)
    parser.add_argument("--hub-repo-id", help="push the delta to this hub repository too")
    parser.add_argument("--dtype", default="float16", help="float16 (as published deltas) or float32 (exact)")
    args = parser.parse_args(argv)
    dtype = delta.named_dtype(args.dtype)
    worst = make_delta(args.base_model_path, args.target_model_path, args.delta_path, dtype)
    print(f"{args.delta_path}: verified; applying it restores every weight to within {worst:.1e}.")  # noqa: T201
    if args.hub_repo_id:
        delta.upload(args.delta_path, args.hub_repo_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
