"""Correctness and speed on one GPU, in eight minutes at most: `python -m benchmarks.gpu --out RESULTS --golden GOLDEN`.

Floors are computed from ceilings measured in the same run; each line gives the fraction of its floor. Every line is
printed and written to OUT/gpu.json immediately. `--device cpu --quick` runs every part at toy sizes. The exit status is
1 if a result is wrong or a part fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

SECONDS = 480.0
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
}


def build_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="directory for gpu.json (default: a new temporary directory)")
    add(
        "--golden",
        type=Path,
        help="golden data with models/ and train/ (default: skip the parts that need it)",
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s, the first visible GPU")
    add("--quick", action="store_true", help="toy sizes: checks the benchmark, measures nothing")
    add("--only", nargs="+", choices=names, metavar="PART", help=f"parts to run: {', '.join(names)} (default: all)")
    add("--seconds", type=float, default=SECONDS, help="time limit; later parts are skipped (default: %(default).0f)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from benchmarks.gpu.parts import PARTS

    args = build_parser([part.name for part in PARTS]).parse_args(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA GPU is visible; --device cpu --quick checks the benchmark without one.", file=sys.stderr)
        return 2
    if args.golden is not None and not (args.golden / "models" / "cases.json").is_file():
        print(f"--golden {args.golden}: expected a golden data directory with models/cases.json.", file=sys.stderr)
        return 2
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.report import NOT_ASKED, Report
    from benchmarks.gpu.runner import run_parts

    out = args.out or Path(tempfile.mkdtemp(prefix="llava-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out / "gpu.json", [part.name for part in PARTS])
    chosen = [part for part in PARTS if args.only is None or part.name in args.only]
    if args.quick and args.device == "cpu":
        torch.set_num_threads(1)  # thread synchronisation costs more than tiny matmuls
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="llava-gpu-") as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench = Bench(device, report, Path(work), quick=args.quick, golden=args.golden and args.golden.resolve())
        for part in PARTS:
            if part not in chosen:
                report.close(part.name, "skipped", 0.0, NOT_ASKED, quiet=True)
        run_parts(chosen, bench, start + args.seconds)
        bench.release()
    bench.finish()
    print(f"\nFinished in {time.monotonic() - start:.0f} s. Results: {report.file}")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
