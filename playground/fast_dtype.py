"""Print `bfloat16` if this CPU multiplies matrices faster in it than in float32, otherwise `float32`.

python -m playground.fast_dtype
"""

from __future__ import annotations

import time

import torch

SIDE = 768


def seconds(dtype: torch.dtype) -> float:
    """Minimum time of five products of `SIDE` x `SIDE` matrices."""
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    return min(times)


def fast_dtype() -> str:
    return "bfloat16" if seconds(torch.bfloat16) < seconds(torch.float32) else "float32"


def main() -> int:
    print(fast_dtype())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
