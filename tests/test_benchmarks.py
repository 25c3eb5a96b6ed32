"""The benchmarks run, and compare ways that compute the same thing (no figure is asserted)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import run


@pytest.mark.slow
def test_quick_run_prints_a_ratio_for_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--quick", "train", "load"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 7
    assert all(float(line.split("|")[-2]) > 0 for line in lines[1:])


def test_the_written_table_is_whole() -> None:
    text = Path(run.README).read_text(encoding="utf-8")
    assert text.count(run.BEGIN) == text.count(run.END) == 1
