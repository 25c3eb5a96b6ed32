"""The benchmarks run, and compare ways that compute the same thing (no figure is asserted)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks import agreement, decode, run
from benchmarks import eval as evaluation


@pytest.mark.slow
def test_quick_run_prints_a_ratio_for_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--quick", "train", "load"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 13
    assert all(float(line.split("|")[-2]) > 0 for line in lines[1:])


def test_the_written_table_is_whole() -> None:
    text = Path(run.README).read_text(encoding="utf-8")
    assert text.count(run.BEGIN) == text.count(run.END) == 1


@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_agreement_of_packed_models(
    tiny_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model has no opinions: only that all answers are asked for, and that few agreeing is a failure."""
    monkeypatch.setattr(agreement, "LEAST", {8: 0.0, 4: 0.0})
    assert agreement.main([str(tiny_dirs["chat"]), "--questions", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["8 bits", "4 bits"]
    monkeypatch.setattr(agreement, "agreement", lambda *_: {8: 97.0, 4: 89.5})
    monkeypatch.setattr(agreement, "LEAST", {8: 97.0, 4: 90.0})
    assert agreement.main([str(tiny_dirs["chat"])]) == 1


@pytest.mark.slow
def test_both_ways_answer_every_shape_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation.main(["--quick", "--turns", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "(same answers)" in line]
    assert len(lines) == len(evaluation.SHAPES)


def test_one_stream_says_the_same_both_ways(tiny_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main([str(tiny_dirs["base"]), "--turns", "1", "--tokens", "4", "--quick"]) == 0
    assert "| float32 (same tokens) |" in capsys.readouterr().out
