"""Print the dtype in which this CPU multiplies matrices faster: `bfloat16` or `float32`.

python -m playground.fast_dtype
"""

from __future__ import annotations

import time

import torch

SIDE = 768


def seconds(dtype: torch.dtype) -> float:
    """Time of the fastest of five matmuls of size `SIDE`."""
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> int:
    print("bfloat16" if seconds(torch.bfloat16) < seconds(torch.float32) else "float32")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
