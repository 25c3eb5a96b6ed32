"""Make delta weights of a chat model whose base may not be redistributed: `python -m llava.model.make_delta
--base-model-path BASE --target-model-path TARGET --delta-path DELTA [--hub-repo-id REPO]`.

Deltas are stored in float16, as published ones are; the program applies the delta and prints the rounding error.
`--dtype float32` makes it exact. The tokenizer and configuration are those of the target.
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
from llava.model.hub import push_to_hub
from llava.model.saving import WeightSource, write_checkpoint
from llava.placement import parse_dtype
from llava.utils import guarded


def make_delta(
    base_model_path: str | Path,
    target_model_path: str | Path,
    delta_path: str | Path,
    hub_repo_id: str | None = None,
    *,
    dtype: torch.dtype = torch.float16,
) -> float:
    """Write target - base to the new directory `delta_path`, and push it to `hub_repo_id` if given.

    Returns the largest absolute error of a weight restored from the delta. Raises `CheckpointError` if the directories
    do not belong together, or a difference is too large for `dtype`.
    """
    base, target = WeightSource(Path(base_model_path)), WeightSource(Path(target_model_path))
    delta.check_pair(base, target)

    def subtract(name: str, tensor: Tensor, below: Tensor | None) -> Tensor:
        return tensor if below is None else delta.add_scaled(tensor, below, -1).to(dtype)

    def verify(directory: Path) -> float:
        written, worst = WeightSource(directory), 0.0
        for name in (name for name in written.shapes if name in base.shapes):
            wanted, difference = target.read(name).float(), written.read(name)
            error = float((delta.add_scaled(difference, base.read(name), 1) - wanted).abs().max())
            # The difference is rounded once to `dtype`, the sum once to float32.
            size = float(difference.abs().max()), float(wanted.abs().max())
            allowed = torch.finfo(dtype).eps * size[0] + torch.finfo(torch.float32).eps * (size[0] + 2 * size[1]) + 1e-7
            if not (math.isfinite(error) and error <= allowed):
                raise CheckpointError(
                    f"The delta of {name} has an error of {error:.3g} in {dtype}; use --dtype float32."
                )
            worst = max(worst, error)
        return worst

    worst = write_checkpoint(target.path, delta_path, delta.combine(base, target, subtract), verify)
    if hub_repo_id:
        push_to_hub(delta_path, hub_repo_id)
    return worst


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = delta.make_parser(__doc__)
    parser.add_argument("--hub-repo-id", help="hub repository to push the delta to")
    parser.add_argument("--dtype", default="float16", help="float16 (as published deltas) or float32 (exact)")
    args = parser.parse_args(argv)
    dtype = parse_dtype(args.dtype)
    worst = make_delta(args.base_model_path, args.target_model_path, args.delta_path, args.hub_repo_id, dtype=dtype)
    print(f"{args.delta_path}: verified; applying it restores every weight to within {worst:.1e}.")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
