"""Published scores, noise bands, and the lookup by checkpoint."""

from __future__ import annotations

import pytest

from llava.eval.benchmarks.registry import TASKS
from llava.eval.reporting.data import COLUMNS, MME_BAND, PUBLISHED, find_published, noise_band


def test_published_rows_match_the_model_zoo() -> None:
    assert len(PUBLISHED) == 5
    row = find_published("internvl-chat-vit-6b-vicuna-13b-448PX")
    assert row is not None and row.resolution == 448
    assert (row.scores["VQAv2"], row.scores["MME"], row.scores["MM-Vet"]) == (82.0, 1579.0, 36.7)
    assert "SEED" not in row.scores and PUBLISHED[1].scores["LLaVA-Bench"] == 72.5
    assert find_published("my-model") is None


def test_every_column_has_a_task() -> None:
    assert {task.column for task in TASKS.values() if task.column} == set(COLUMNS)


def test_noise_bands() -> None:
    assert noise_band("MME", 1500.0) == MME_BAND
    assert noise_band("GQA", 50.0) == pytest.approx(0.4458, abs=1e-4)
    assert noise_band("VQAv2", 80.0) < noise_band("MMB", 80.0) < noise_band("LLaVA-Bench", 80.0)
    assert noise_band("LLaVA-Bench", 101.0) == 0
