"""The benchmarks run, and compare ways that compute the same thing (no figure is asserted)."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import agreement, decode, floor, lora, packing, quantized, run, sampling, soak, soak_requests, speedrun
from benchmarks import eval as evaluation
from tests.serve.stubs import StubEngine, live_controller, live_worker, until
from tests.tiny import CHAT


def table_rows(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert all(float(line.split("|")[-2]) > 0 for line in lines)
    return lines


def test_quick_run_of_the_floors_prints_a_share_for_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert floor.main(["--quick", "--turns", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("% |")]
    assert len(lines) == 2 * 10 and all(float(line.split("|")[-2].rstrip("% ")) > 0 for line in lines)


@pytest.mark.slow
def test_quick_run_of_loading_prints_a_ratio_for_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--quick", "load"]) == 0
    assert len(table_rows(capsys)) == 4


def test_quick_run_of_training_prints_a_ratio_for_every_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which saves six starts; the losses of both ways agree, or it raises."""

    def measure(module: str, **settings: Any) -> dict[str, float]:
        figures: dict[str, float] = importlib.import_module(module).run(**settings)
        return figures

    monkeypatch.setattr(run, "measure", measure)
    assert run.main(["--quick", "train"]) == 0
    assert len(table_rows(capsys)) == 12


@pytest.mark.slow
def test_quick_run_of_packing_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--quick", "--budgets", "7200", "--steps", "5", "--timed", "1", "--rounds", "1"]
    assert packing.main(argv) == 0
    output = capsys.readouterr().out
    assert "| 7200 | " in output and "fill of the budget" in output
    assert [line.count("(1.000)") for line in output.splitlines() if line.startswith("| 8 ranks")] == [1]


def test_the_written_table_is_whole() -> None:
    text = Path(run.README).read_text(encoding="utf-8")
    assert text.count(run.BEGIN) == text.count(run.END) == 1


def test_adapters_beside_their_base(tiny_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rank", "4", "--batch", "4", "--tokens", "3", "--pairs", "1"]
    assert lora.main(["--model-path", str(tiny_dirs["base"]), "--text-only", "--device", "cpu", *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"ratio, rank 4, batch 4: \d+\.\d+ \(.* 1 pairs\)", lines[-2])
    assert lines[-1] == "rows with the tokens that they get alone: 4 of 4"


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


def test_every_precision_of_two_models_is_measured(
    tiny_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--width", "64", "--layers", "1", "--turns", "1", "--tokens", "3", "--quick"]
    assert quantized.main([str(tiny_dirs["base"]), *sizes]) == 0
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if " bit |" in line]
    assert names == [f"{name}, {bits} bit" for name in ("vicuna-tiny", "width 64") for bits in (16, 8, 4)]


def test_both_ways_of_sampling_draw_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert sampling.main(["--turns", "3", "--rows", "2", "--vocabulary", "500"]) == 0
    assert "6 of 6 tokens the same" in capsys.readouterr().out


def test_a_soak_knows_a_last_frame_from_two_and_from_none() -> None:
    """Replies as a server might send them, and what is said of them."""

    def judged(content: bytes, end: bytes = b"0\r\n\r\n", **more: Any) -> soak_requests.Outcome:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        call = soak_requests.Call("whole", more.get("path", soak_requests.STREAM), b"")
        return soak_requests.judge(call, head + b"%x\r\n%s\r\n" % (len(content), content) + end)

    frame, last = b'{"text": "a", "error_code": 0}\0', b'{"text": "a", "error_code": 0, "finish_reason": "stop"}\0'
    assert judged(frame + last) == soak_requests.Outcome("answered")
    assert judged(frame).word == judged(frame + last, end=b"").word == "broken"
    assert judged(last + last).fault == judged(last + frame).fault == "2 final frames"
    event, done = b'data: {"choices": [{"finish_reason": "stop"}]}\n\n', b"data: [DONE]\n\n"
    assert judged(event + done, path=soak_requests.API) == soak_requests.Outcome("answered")
    assert judged(event + event + done, path=soak_requests.API).fault == "2 final frames"
    assert judged(event, path=soak_requests.API).word == "broken"


def test_a_soak_finds_what_leaked() -> None:
    before = soak.State(0, 9, 20, 300.0)
    assert soak.State(0, 9, 20, 300.0).leaks(before) == []
    assert soak.State(1, 59, 30, 400.0).leaks(before) == ["1 slots", "50 threads", "10 files", "100.0 MiB"]
    assert soak.State.of(os.getpid(), "").threads >= threading.active_count()


def test_everything_malformed_in_a_soak_is_refused() -> None:
    engine = StubEngine(context=2048)
    with live_controller() as controller, live_worker(engine, controller=controller.url, name=CHAT) as worker:
        until(lambda: controller.registry.models() == [CHAT])
        draw = soak_requests.Draw(0)
        for path in (soak_requests.STREAM, soak_requests.API):
            for wrong in soak_requests.WRONG:
                outcome = asyncio.run(soak_requests.send(controller.url, draw.wrong(path, *wrong)))
                assert outcome.word.startswith("refused 4") and not outcome.fault, (wrong[0], outcome)
        good = soak_requests.Call("whole", soak_requests.STREAM, draw.body(soak_requests.STREAM, long=False))
        assert asyncio.run(soak_requests.send(worker.url, good)) == soak_requests.Outcome("answered")


def test_a_speedrun_takes_turns_and_repeats_no_recorded_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = speedrun.read_items(speedrun.package_directory("easy_vqa", "") / "data/test/questions.json")
    labels = speedrun.label_images(questions)
    teal = [labels.get(image) == {"color": "teal", "shape": "triangle"} for _, _, image in questions]
    executed: list[tuple[str, Path, Sequence[str]]] = []

    def execute(name: str, command: Sequence[str], root: Path, log: Path) -> float:
        executed.append((name, root, command))
        if name == "evaluation":
            result = Path(command[command.index("--output-dir") + 1]) / "easy_vqa"
            result.mkdir(parents=True)
            (result / "score.json").write_text('{"overall": {"accuracy": 97.5}}')
            rows = [
                {"question_id": k, "text": f"{answer}." if teal[k] and k % 2 else "?"}
                for k, (_, answer, _) in enumerate(questions)
            ]
            (result / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 50.0 if root == speedrun.ROOT else 100.0

    monkeypatch.setattr(speedrun, "execute", execute)
    monkeypatch.setattr(speedrun, "git", lambda *words: "v1" if words[-1].startswith("v1^") else "abc1234")
    (tmp_path / "smollm2-135m-instruct").mkdir()
    argv = ["--output", str(tmp_path), "--seeds", "7", "8", "--hold-out", "teal triangle"]
    assert speedrun.main([*argv, "--before", "v1"]) == 0
    table = capsys.readouterr().out
    steps = ["data", "tower", "stage 1", "stage 2", "evaluation"]
    assert [name for name, _, _ in executed] == steps * 3
    trained = [(root.name, command[command.index("--seed") + 1]) for name, root, command in executed if name == "tower"]
    assert trained == [("checkout-v1", "7"), (speedrun.ROOT.name, "7"), (speedrun.ROOT.name, "8")]
    assert "before: 97.50 % over 1 seed, lowest 97.50 %" in table
    assert "time now / before: both stages 0.50, with the tower 0.50" in table
    odd = [k % 2 for k, shown in enumerate(teal) if shown]
    assert f"{100 * sum(odd) / len(odd):.1f} % (teal triangle)" in table and 20 < sum(odd) < len(odd)
    executed.clear()
    assert speedrun.main(argv) == 0
    assert executed == [] and "abc1234 | 8 |" in capsys.readouterr().out
