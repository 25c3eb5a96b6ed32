"""The console shows one line per log step, and a progress bar on a terminal; `log.jsonl` holds the same in full."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
import termios
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava.train.reporting import Console, format_line, truncate_log
from llava.train.train import train
from tests.train import runs

Dirs = dict[str, Path]
LINE = re.compile(
    r"step (\d+)/(\d+) \| epoch \d\.\d\d \| loss \d+\.\d{4} \| lr \d\.\d\de[+-]\d\d \| grad norm [\d.e+-]+ \| "
    r"[\d,]+ tokens/s \| \d+\.\d GiB( \| \d+:\d\d:\d\d left)?"
)


def entries(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def test_a_line_has_every_number_with_its_unit() -> None:
    logs = {
        "loss": 1.23456,
        "learning_rate": 1.98765e-05,
        "epoch": 0.5,
        "supervised_tokens": 900,
        "grad_norm": 1.23456,
        "tokens_per_second": 12345.6,
        "samples_per_second": 3.2,
        "memory_gib": 34.56,
        "time_left": "1:02:03",
    }
    assert format_line(logs, 7, 128) == (
        "step 7/128 | epoch 0.50 | loss 1.2346 | lr 1.99e-05 | grad norm 1.23 | 12,346 tokens/s | 34.6 GiB | "
        "1:02:03 left"
    )
    assert format_line({"eval_loss": 2.0, "eval_runtime": 3.1, "epoch": 1.0}, 8, 8) == (
        "step 8/8 | epoch 1.00 | validation loss 2.0000"
    )
    assert format_line({"train_runtime": 62.2, "train_loss": 1.5, "epoch": 1.0}, 8, 8) == (
        "training finished: 8 steps in 0:01:02 | mean loss 1.5000"
    )
    assert format_line({"my_metric": 3, "epoch": 1.0}, 8, 8) == "step 8/8 | epoch 1.00 | my_metric 3"


def test_without_a_terminal_there_are_plain_lines_and_the_log_is_complete(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(runs.flags(tiny_dirs, small_data, tmp_path, 1, max_steps=3, disable_tqdm=None))
    output = capsys.readouterr()
    *lines, last = output.out.splitlines()
    assert [LINE.fullmatch(line).groups()[:2] for line in lines] == [("1", "3"), ("2", "3"), ("3", "3")]  # type: ignore[union-attr]
    assert lines[1].endswith(" left") and last.startswith("training finished: 3 steps in 0:00:0")
    assert "\r" not in output.out + output.err and "it/s" not in output.err and "{'" not in output.out
    state = {entry["step"]: entry for entry in runs.history(tmp_path)}
    logged = [entry for entry in entries(tmp_path) if "loss" in entry]
    for entry in logged:
        del entry["time"]
        assert entry == state[entry["step"]]
        assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib", "epoch"} <= set(entry)
        assert 0.05 < entry["memory_gib"] < 64
    assert "train_runtime" in entries(tmp_path)[-1]


def test_on_a_terminal_there_is_a_progress_bar_too(
    tiny_dirs: Dirs, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux reports a closed terminal as an I/O error
                return
            if not part:
                return
            seen.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            patch.setattr(sys, "stderr", terminal)
            more = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "validation_fraction": 0.25}
            train(runs.flags(tiny_dirs, small_data, tmp_path, 1, **more, eval_generations=0, disable_tqdm=None))
    finally:
        reader.join(timeout=60)
        os.close(master)
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", seen.decode())
    parts = [part.strip() for part in re.split(r"[\r\n]+", text)]
    assert [match[1] for match in map(LINE.fullmatch, parts) if match] == ["1", "2", "3"]
    bars = [part for part in parts if part.startswith("training:")]
    assert bars and " 3/3 [" in bars[-1]
    assert any(part.startswith("validation:") for part in parts)
    assert any(re.fullmatch(r"step 3/3 \| epoch [\d.]+ \| validation loss [\d.]+", part) for part in parts)
    assert "{'" not in text


def test_a_bar_can_be_switched_off_and_other_ranks_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for disable, writes in ((True, True), (False, False)):
        args: Any = SimpleNamespace(disable_tqdm=disable)
        state: Any = SimpleNamespace(is_world_process_zero=writes, global_step=1, max_steps=2)
        console = Console()
        console.on_train_begin(args, state, None)
        console.on_step_end(args, state, None)
        console.on_prediction_step(args, state, None, eval_dataloader=[])
        console.on_log(args, state, None, logs={"loss": 1.0})
        console.on_train_end(args, state, None)
        output = capsys.readouterr()
        assert output.err == "" and output.out == ("step 1/2 | loss 1.0000\n" if writes else "")


def test_a_resumed_run_logs_every_step_once(tiny_dirs: Dirs, small_data: Path, tmp_path: Path) -> None:
    argv = runs.flags(tiny_dirs, small_data, tmp_path, 1, save_strategy="steps", save_steps=3)
    train(argv)
    losses = [(entry["step"], entry["loss"]) for entry in entries(tmp_path) if "loss" in entry]
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # cut short by a crash
    train(argv)
    assert [(entry["step"], entry["loss"]) for entry in entries(tmp_path) if "loss" in entry] == losses
    assert [entry["step"] for entry in entries(tmp_path) if "train_runtime" in entry] == [8]
    assert len(losses) == 8


def test_only_later_and_broken_entries_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    truncate_log(path, 3)
    assert not path.exists()
    kept = '{"step": 1, "loss": 2.0}\n{"step": 3, "eval_loss": 2.0}\n'
    path.write_text(kept)
    before = path.stat().st_ino
    truncate_log(path, 3)
    assert path.read_text() == kept and path.stat().st_ino == before  # untouched
    path.write_text(
        kept + '{"step": 3, "train_runtime": 1.0}\n{"step": 4, "loss": 1.0}\nnull\n{"step": 2, "loss": 1.0}'
    )
    truncate_log(path, 3)
    assert path.read_text() == kept
