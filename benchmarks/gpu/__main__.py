"""Correctness and speed on one GPU, in eight minutes at most: `python -m benchmarks.gpu --out RESULTS --golden GOLDEN`.

Floors follow from ceilings that the same run measures; a line says what share of its floor is reached. Every line is
printed and written to OUT/gpu.json as soon as it is known. `--device cpu --quick` runs every part at sizes that mean
nothing. The exit status is 1 when a result is wrong or a part fails.
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
    add("--out", type=Path, help="directory of gpu.json (default: a new temporary one, named at the end)")
    add("--golden", type=Path, help="directory with the golden models/ and train/ (default: skip what needs it)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s, the first visible card")
    add("--quick", action="store_true", help="tiny sizes: checks the benchmark, measures nothing")
    add("--only", nargs="+", choices=names, metavar="PART", help=f"some of {', '.join(names)}")
    add("--seconds", type=float, default=SECONDS, help="parts that do not start by then are left out (%(default).0f)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from benchmarks.gpu.parts import PARTS

    args = build_parser([part.name for part in PARTS]).parse_args(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA GPU is visible; try --device cpu --quick, which only checks the benchmark.", file=sys.stderr)
        return 2
    if args.golden is not None and not (args.golden / "models" / "cases.json").is_file():
        print(f"--golden {args.golden} has no models/cases.json; give the directory golden/.", file=sys.stderr)
        return 2
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.report import NOT_ASKED, Report
    from benchmarks.gpu.runner import run_parts

    out = args.out or Path(tempfile.mkdtemp(prefix="llava-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out / "gpu.json", [part.name for part in PARTS])
    chosen = [part for part in PARTS if args.only is None or part.name in args.only]
    if args.quick and args.device == "cpu":
        torch.set_num_threads(1)  # threads that meet after every tiny product take longer than one alone
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
    print(f"\n{time.monotonic() - start:.0f} s; {report.file}")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
