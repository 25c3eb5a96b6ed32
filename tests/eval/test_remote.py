"""`--api-base`: questions and images sent to an OpenAI-compatible server."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.engine.sequence import SamplingParams
from llava.errors import ConfigError, ImageError, RequestError
from llava.eval import main as evaluate
from llava.eval import model_vqa_loader
from llava.eval.run.manifest import manifest_path
from llava.eval.run.remote_model import RemoteModel, complete, map_unordered, served_model
from llava.eval.run.runner import RunSettings
from llava.images import image_data_url
from tests.eval.benchdata import BENCHMARKS
from tests.eval.conftest import question_rows, read_jsonl, write_jsonl
from tests.eval.fake_server import FakeServer


def color(body: dict[str, Any]) -> tuple[int, str]:
    """Reply with the color of the image in a message, or with its text."""
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return 200, f" no image: {content} "
    kinds = [part["type"] for part in content]
    assert kinds == ["image_url", "text"]
    encoded = content[0]["image_url"]["url"].partition(";base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        return 200, str(image.convert("RGB").getpixel((0, 0)))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    fake = FakeServer(color)
    yield fake
    fake.close()


def command(server: FakeServer, images: Path, tmp_path: Path, *more: str) -> list[str]:
    questions = write_jsonl(tmp_path / "q.jsonl", question_rows(10))
    return [
        *("--api-base", server.url + "/", "--image-folder", str(images), "--question-file", str(questions)),
        *("--answers-file", str(tmp_path / "a.jsonl"), "--temperature", "0", *more),
    ]


def test_questions_go_to_a_server(server: FakeServer, images: Path, tmp_path: Path) -> None:
    assert model_vqa_loader.main(command(server, images, tmp_path)) == 0
    rows = read_jsonl(tmp_path / "a.jsonl")
    assert [row["text"] for row in rows[:5]] == [
        "(255, 0, 0)", "(0, 128, 0)", "(0, 0, 255)", "(128, 128, 128)", "no image: What is number 4?",
    ]  # fmt: skip
    assert rows[0]["model_id"] == "fake" and len(rows) == 10
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"], "seed" in body) == ("fake", 0.0, 128, False)
    identity = json.loads(manifest_path(tmp_path / "a.jsonl").read_text())["identity"]
    assert identity["checkpoint"] == "api:fake"
    count = len(server.bodies)
    assert model_vqa_loader.main(command(server, images, tmp_path)) == 0
    assert len(server.bodies) == count


def test_failures_are_recorded_and_retried(
    server: FakeServer, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def moody(body: dict[str, Any]) -> tuple[int, str]:
        return (400, "too long") if "number 4" in str(body) else color(body)

    server.answer = moody
    assert model_vqa_loader.main(command(server, images, tmp_path, "--temperature", "0.5", "--batch-size", "3")) == 1
    assert "1 question(s) failed" in capsys.readouterr().err
    assert "HTTP 400" in read_jsonl(tmp_path / "a.jsonl")[4]["metadata"]["error"]
    assert len({body["seed"] for body in server.bodies}) == 10
    server.answer = color
    assert model_vqa_loader.main(command(server, images, tmp_path, "--temperature", "0.5")) == 0


def test_a_server_that_always_streams_is_read(server: FakeServer) -> None:
    server.answer = None
    deltas = [{"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "grün "}}]}]
    deltas += [{"choices": [{"delta": {"content": "ja"}}]}, {"choices": [], "usage": {}}]
    server.stream = "".join(f"data: {json.dumps(each, ensure_ascii=False)}\n\n" for each in deltas) + "data: [DONE]\n"
    assert complete(server.url, {"model": "m"}).text == "grün ja" and server.bodies[0]["stream"] is False
    server.stream = 'data: {"error": {"message": "broken"}}\n\n'
    with pytest.raises(RequestError, match=r"gave no reply \(broken\)"):
        complete(server.url, {"model": "m"}, tries=1)


def test_an_answer_without_text_withholds_the_score_and_thinking_is_kept_apart(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, count, make = BENCHMARKS["pope"]
    (tmp_path / folder).mkdir()
    make(tmp_path / folder)
    flags = ["--tasks", "pope", "--api-base", server.url, "--eval-data", str(tmp_path), "--output-dir", str(tmp_path)]
    for content in (None, "", "<think>yes", [{"type": "refusal", "refusal": "I cannot."}]):
        server.message = {"content": content}
        assert evaluate.main([*flags, "--overwrite"]) != 0
        assert "gave no reply" in capsys.readouterr().err
        assert not (tmp_path / "pope" / "score.json").exists()
    server.message = {"content": [{"type": "text", "text": "<think>no?</think>\n"}, {"type": "text", "text": "Yes"}]}
    assert evaluate.main([*flags, "--overwrite"]) == 0
    rows = read_jsonl(tmp_path / "pope" / "answers.jsonl")
    assert len(rows) == count
    assert {(row["text"], row["metadata"]["thinking"]) for row in rows} == {("Yes", "no?")}
    facts = [row["metadata"] for row in rows]
    assert facts[0]["first_prompt"] == rows[0]["prompt"] and facts[0]["finish_reason"] == "stop"
    assert (
        len({row["prompt_hash"] for row in facts}) == 2
        and len({*map(str, (row["image_hashes"] for row in facts))}) == 1
    )


def test_retries_are_only_for_what_may_pass(server: FakeServer) -> None:
    waits: list[float] = []

    def ask() -> str:
        return complete(server.url, {"model": "m", "max_tokens": 5}, sleep=waits.append).text

    server.answer = None
    server.headers = {"Retry-After": "9"}
    server.replies = [(429, ""), (503, ""), (200, "yes")]
    assert ask() == "yes" and waits == [9, 9]
    for body, status in (({"error": {"message": "No.", "code": 400}}, 200), ({"detail": "No."}, 404)):
        server.body, server.replies, count = body, [(status, "")], len(server.bodies)
        with pytest.raises(RequestError, match=r"No\."):
            ask()
        assert len(server.bodies) == count + 1
    assert len(waits) == 2


def test_a_server_that_wants_the_newer_token_field_gets_it(server: FakeServer) -> None:
    unsupported = "Unsupported parameter: 'max_tokens' is not supported; use 'max_completion_tokens' instead."

    def newer(body: dict[str, Any]) -> tuple[int, str]:
        server.body = {"error": {"message": unsupported, "param": "max_tokens"}} if "max_tokens" in body else None
        return (400, "") if "max_tokens" in body else (200, "yes")

    server.answer = newer
    for asked in (2, 3):
        assert complete(server.url, {"model": "o", "max_tokens": 5}, tries=1).text == "yes"
        assert len(server.bodies) == asked and server.bodies[-1]["max_completion_tokens"] == 5


def test_a_server_without_answers_ends_the_run(
    server: FakeServer, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda body: (404, "no such model")
    assert model_vqa_loader.main(command(server, images, tmp_path, "--batch-size", "2")) == 2
    assert "8 consecutive questions got no answer" in capsys.readouterr().err
    server.answer = color
    assert model_vqa_loader.main(command(server, images, tmp_path)) == 0


def test_llava_eval_asks_a_server(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda body: (200, "Yes")
    folder, count, make = BENCHMARKS["gqa"]
    (tmp_path / folder).mkdir()
    make(tmp_path / folder)
    flags = ["--tasks", "gqa", "--api-base", server.url, "--eval-data", str(tmp_path), "--output-dir", str(tmp_path)]
    assert evaluate.main(flags) == 0
    assert "100.00 %" in capsys.readouterr().out
    assert json.loads((tmp_path / "gqa" / "score.json").read_text())["model_id"] == "fake"
    (tmp_path / "gqa" / "score.json").unlink()
    server.answer = lambda body: pytest.fail("asked again")
    assert evaluate.main([*flags, "--score-only"]) == 0 and (tmp_path / "gqa" / "score.json").is_file()
    assert evaluate.main([*flags, "--score-only", "--num-chunks", "2"]) == 2
    assert "Shard 0 of 2" in capsys.readouterr().err and count == 7
    server.answer = lambda body: (400, "no")
    assert evaluate.main([*flags, "--overwrite"]) == 1  # new answers failed, so the old score is removed
    assert not (tmp_path / "gqa" / "score.json").exists()


def test_closing_does_not_wait_for_running_threads() -> None:
    release, started = threading.Event(), threading.Event()

    def work(item: int) -> int:
        if item == 3:
            started.set()
            assert release.wait(60)
        return item * item

    assert sorted(map_unordered(lambda item: -item, range(50), 4)) == list(range(-49, 1))
    answers = map_unordered(work, range(10), 2)
    assert next(answers) in (0, 1) and started.wait(60)
    answers.close()  # returns while a thread is still running
    release.set()
    with pytest.raises(ZeroDivisionError):
        list(map_unordered(lambda item: 1 // item, [1, 0], 2))


def test_a_server_with_several_models_requires_a_name(server: FakeServer) -> None:
    server.models = ["a", "b"]
    with pytest.raises(RequestError, match="has the models a, b; choose one with --api-model"):
        served_model(server.url)
    with pytest.raises(RequestError, match="does not list its models"):
        served_model("http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "No model given; use --model-path CHECKPOINT, or --api-base"),
        (["--api-base", "http://x", "--model-path", "y"], "exclude each other; give one of them"),
        (["--api-base", "URL", "--num_beams", "2"], "beam search"),
        (["--api-base", "127.0.0.1:1/v1", "--api-model", "m"], "'127.0.0.1:1/v1' must start with http:// or https://"),
    ],
)
def test_conflicting_flags_are_reported_in_one_line(
    flags: list[str], message: str, server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_jsonl(tmp_path / "q.jsonl", question_rows(1))
    words = [server.url if flag == "URL" else flag for flag in flags]
    assert (
        model_vqa_loader.main([*words, "--question-file", str(questions), "--answers-file", str(tmp_path / "a")]) == 2
    )
    assert message in capsys.readouterr().err


def test_servers_do_not_support_follow_ups() -> None:
    settings = RunSettings("", "", "", SamplingParams(4), follow_up=" ###")
    with pytest.raises(ConfigError, match="--answer-prompter"):
        RemoteModel("http://x", "m").identity(settings)


def test_images_are_sent_unchanged_or_as_png(images: Path) -> None:
    content = (images / "red.png").read_bytes()
    assert image_data_url(content) == f"data:image/png;base64,{base64.b64encode(content).decode()}"
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3), "red").save(buffer, "BMP")
    assert image_data_url(buffer.getvalue()).startswith("data:image/png;base64,")
    buffer = io.BytesIO()
    Image.new("P", (3, 3)).save(buffer, "GIF", save_all=True, append_images=[Image.new("P", (3, 3), 1)])
    assert image_data_url(buffer.getvalue()).startswith("data:image/png;base64,")
    with pytest.raises(ImageError):
        image_data_url(b"no image")
