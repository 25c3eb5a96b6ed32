"""Reporters: TensorBoard by default where installed; wandb never prompts, and a failing reporter ends no run."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llava.arguments import usable_reporters
from llava.train import reporting
from llava.train.train import train
from tests.train import runs


def test_tensorboard_is_used_where_installed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    installed = {"tensorboard"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert usable_reporters(["auto"]) == ["tensorboard"]
    assert usable_reporters("none") == usable_reporters(None) == ["none"]
    assert usable_reporters(["tensorboard", "wandb"]) == ["tensorboard"]
    assert "--report_to wandb: the package wandb is not installed" in caplog.text
    installed.clear()
    caplog.clear()
    assert usable_reporters("auto") == usable_reporters("all") == ["none"]
    assert caplog.text.count("not installed") == 2


def test_wandb_without_a_key_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, mode in (({}, "offline"), ({"WANDB_API_KEY": "k"}, None), ({"WANDB_MODE": "online"}, "online")):
        environment = dict(given)
        reporting.default_wandb_offline(environment)
        assert environment.get("WANDB_MODE") == mode
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    environment = {}
    reporting.default_wandb_offline(environment)
    assert environment == {}


def test_training_continues_without_a_failing_reporter(
    tiny_dirs: dict[str, Path],
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The real TensorBoard writes its events until its writer breaks at the second log line."""
    pytest.importorskip("tensorboard")
    from transformers.integrations import TensorBoardCallback

    log, calls = TensorBoardCallback.on_log, []

    def failing(self: TensorBoardCallback, *args: object, **kwargs: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no space left on the dashboard")
        log(self, *args, **kwargs)

    monkeypatch.setattr(TensorBoardCallback, "on_log", failing)
    with caplog.at_level(logging.WARNING):
        train(runs.flags(tiny_dirs, small_data, tmp_path, 1, max_steps=4, report_to="tensorboard"))
    assert len(calls) == 2 and len(runs.losses(tmp_path)) == 4
    assert "TensorBoard failed (OSError: no space left on the dashboard)" in caplog.text
    assert list((tmp_path / "runs").rglob("events.out.tfevents*"))
