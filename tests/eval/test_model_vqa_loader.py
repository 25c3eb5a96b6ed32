"""`python -m llava.eval.model_vqa_loader`: published flags, chunks, and resumption after SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.eval import model_vqa_loader
from llava.eval.run.manifest import manifest_path
from tests.eval.conftest import question_rows, read_jsonl, write_jsonl


@pytest.fixture
def flags(tiny_dirs: dict[str, Path], images: Path, tmp_path: Path) -> list[str]:
    questions = write_jsonl(tmp_path / "questions.jsonl", question_rows(10))
    return [
        *("--model-path", str(tiny_dirs["chat"]), "--image-folder", str(images), "--question-file", str(questions)),
        *("--device", "cpu", "--conv-mode", "vicuna_v1", "--max_new_tokens", "4"),
    ]


def test_chunks_join_to_the_whole(flags: list[str], tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    assert model_vqa_loader.main([*flags, "--temperature", "0", "--answers-file", str(whole)]) == 0
    parts = b""
    for k in range(4):
        part = tmp_path / f"{k}.jsonl"
        chunk = ["--num-chunks", "4", "--chunk-idx", str(k), "--batch-size", "3", "--answers-file", str(part)]
        assert model_vqa_loader.main([*flags, "--temperature", "0", *chunk]) == 0
        parts += part.read_bytes()
    assert parts == whole.read_bytes() and len(read_jsonl(whole)) == 10


def test_an_empty_chunk_is_an_empty_file(flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    assert model_vqa_loader.main([*flags, "--num-chunks", "8", "--chunk-idx", "7", "--answers-file", str(path)]) == 0
    assert path.read_bytes() == b""


def test_both_spellings_and_the_published_defaults(flags: list[str]) -> None:
    parse = model_vqa_loader.build_parser().parse_args
    args = parse(flags)
    assert (args.temperature, args.top_p, args.num_beams, args.num_chunks, args.chunk_idx) == (0.2, None, 1, 1, 0)
    assert parse(["--model-path", "x"]).max_new_tokens == 128 and str(args.answers_file) == "answer.jsonl"
    dashes = parse([*flags, "--top-p", "0.9", "--num-beams", "2", "--max-new-tokens", "9"])
    scores = parse([*flags, "--top_p", "0.9", "--num_beams", "2", "--max_new_tokens", "9"])
    assert dashes == scores and dashes.top_p == 0.9


def test_sampled_and_beam_runs(flags: list[str], tmp_path: Path) -> None:
    for name, extra in (("sampled", ["--top_p", "0.8"]), ("beams", ["--temperature", "0", "--num_beams", "2"])):
        files = [tmp_path / f"{name}{run}.jsonl" for run in range(2)]
        for file in files:
            assert model_vqa_loader.main([*flags, *extra, "--limit", "3", "--answers-file", str(file)]) == 0
        assert files[0].read_bytes() == files[1].read_bytes() and len(read_jsonl(files[0])) == 3


def test_default_answers_file_goes_to_the_current_folder(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_vqa_loader.main([*flags, "--limit", "1"]) == 0
    assert len(read_jsonl(tmp_path / "answer.jsonl")) == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--conv-mode", "v9"], "template 'v9'"),
        (["--question-file", "none.jsonl"], "none.jsonl"),
        (["--chunk-idx", "1"], "chunk index must be between 0 and 0 for 1 chunk(s), got 1"),
        (["--top_p", "2"], "top_p must be in (0, 1], got 2.0"),
        (["--question-file", os.devnull], "--question-file '/dev/null' is not a file"),
        (["--image-folder", "/nowhere"], "--image-folder '/nowhere' is not a directory"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--limit", "-1"], "--limit must be at least 1, got -1"),
        (["--num-chunks", "0"], "--num-chunks must be at least 1, got 0"),
    ],
)
def test_errors_are_reported_in_one_line_before_a_model_is_loaded(
    flags: list[str],
    tmp_path: Path,
    extra: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llava.engine.engine.load_engine", lambda *arguments, **options: pytest.fail("loaded"))
    assert model_vqa_loader.main([*flags, "--answers-file", str(tmp_path / "a.jsonl"), *extra]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_file_without_questions_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[bool] = []
    monkeypatch.setattr(model_vqa_loader, "exit_with_parent", lambda: followed.append(True))
    (tmp_path / "questions.jsonl").write_text("\n")
    assert model_vqa_loader.main(flags) == 2
    assert "has no questions" in capsys.readouterr().err
    assert followed  # as a shard of a script


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_in_one_line(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answers = tmp_path / "a.jsonl"
    answers.symlink_to("/dev/full")
    assert model_vqa_loader.main([*flags, "--limit", "1", "--answers-file", str(answers)]) == 2
    assert f"error: Cannot write {answers}: No space left on device" in capsys.readouterr().err
    assert model_vqa_loader.main([*flags, "--limit", "1", "--answers-file", str(tmp_path)]) == 2
    assert f"error: Cannot write {tmp_path}: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "model", "explicit", "expected"),
    [
        ("v1", "plain-model", True, "v1_mmtag"),
        ("v0", "plain-model", True, "v0_mmtag"),
        ("v1_mmtag", "plain-model", True, "v1_mmtag"),
        ("llava_v1", "plain-model", True, "llava_v1"),
        ("v1", "plain-Finetune", True, "v1"),
        ("v1", "Plain-model", True, "v1"),
        ("v1", "plain-model", False, "v1"),
    ],
)
def test_plain_models_use_registered_tags_only(name: str, model: str, explicit: bool, expected: str) -> None:
    assert model_vqa_loader.mmtag_template(name, model, explicit) == expected


def test_a_pad_or_crop_flag_is_recorded(flags: list[str], tmp_path: Path) -> None:
    for mode in ("pad", "crop"):
        path = tmp_path / f"{mode}.jsonl"
        more = ["--temperature", "0", "--image-aspect-ratio", mode, "--answers-file", str(path)]
        assert model_vqa_loader.main([*flags, *more]) == 0
        assert f'"image_aspect_ratio": "{mode}"' in manifest_path(path).read_text()


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(flags: list[str], tmp_path: Path) -> None:
    rows = question_rows(60)
    questions = write_jsonl(tmp_path / "many.jsonl", rows)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    more = ["--question-file", str(questions), "--temperature", "0", "--batch-size", "2", "--max-new-tokens", "20"]
    assert model_vqa_loader.main([*flags, *more, "--answers-file", str(whole)]) == 0
    command = [sys.executable, "-m", "llava.eval.model_vqa_loader", *flags, *more, "--answers-file", str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed.is_file() and killed.stat().st_size > 2000):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2000 < killed.stat().st_size < whole.stat().st_size
    assert model_vqa_loader.main([*flags, *more, "--answers-file", str(killed)]) == 0
    assert killed.read_bytes() == whole.read_bytes()
