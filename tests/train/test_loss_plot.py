"""Loss plot: smoothing without bias, and a valid PNG file."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from llava.train.reporting import plot_loss, smoothed, smoothing


def test_smoothing_has_no_bias_to_the_start_and_follows_the_mean() -> None:
    assert smoothed([3.0] * 5, decay=0.9) == pytest.approx([3.0] * 5)
    assert smoothed([4.0, 2.0], decay=0.5) == pytest.approx([4.0, (0.25 * 4 + 0.5 * 2) / 0.75])


def test_a_short_curve_is_smoothed_less_than_a_long_one() -> None:
    assert [smoothing(count) for count in (2, 40, 200, 10**6)] == [0.5, 0.5, 0.9, 0.99]


def test_the_plot_shows_entries_with_a_loss(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    assert not plot_loss([{"step": 1, "loss": 2.0}, {"step": 1, "train_loss": 2.0}], path, "run")
    assert not path.exists()
    assert plot_loss([{"step": k, "loss": 5.0 / k} for k in range(1, 30)], path, "run")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size[0] >= 600
        assert len(image.convert("RGB").getcolors(maxcolors=2**24) or []) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
