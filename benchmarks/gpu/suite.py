"""The project's own engine tests, run with the GPU visible."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.runner import Skip

ROOT: Final = Path(__file__).parents[2]
TESTS: Final = ("tests/engine", "tests/model/test_packed.py")
FEW: Final = ("tests/engine/test_sampling.py", "-k", "greedy")
NEEDED: Final = ("pytest", "hypothesis", "sentencepiece")


def tests(bench: Bench) -> None:
    """Run `pytest` in a separate process, after freeing the memory of this one."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"the tests need {', '.join(missing)}, which is not installed")
    bench.release()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(FEW if bench.quick else TESTS)]
    if importlib.util.find_spec("pytest_timeout") is None:
        command += ["-o", "addopts=-ra", "-W", "ignore::pytest.PytestConfigWarning"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=max(5.0, bench.left()),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Skip(
            f"the tests took longer than {error.timeout:.0f} s; run pytest {' '.join(TESTS)} by itself"
        ) from error
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    if done.returncode:
        print("\n".join(lines[-25:]), flush=True)
    bench.check(f"pytest {' '.join(FEW if bench.quick else TESTS)}", done.returncode == 0, lines[-1].strip("= "))
