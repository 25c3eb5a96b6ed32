"""The chat: a conversation in a terminal, one answer, a file of prompts; in this process and in real ones."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from llava.conversation import get_template, stop_strings
from llava.engine import Engine, Request, SamplingParams, chat
from llava.engine.chat import ChatSession, is_stage_one, load_image, parse_setting
from llava.errors import ConfigError, ImageError, RequestError
from llava.serve import cli
from llava.serve.chat_terminal import command, interrupt_cancels, role_name


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


@pytest.fixture
def session(engine: Engine) -> ChatSession:
    return ChatSession(engine, "v1", SamplingParams(6))


def say(session: ChatSession, text: str) -> str:
    completion = session.ask(text).result()
    session.add_answer(completion)
    return completion.text


def run_main(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = cli.main(argv)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


# --- a conversation -------------------------------------------------------------------------------------------------


def test_turns_and_images_build_the_trained_prompt(session: ChatSession, photo: Path) -> None:
    session.attach(str(photo))
    first = say(session, "What is this?")
    second = say(session, "And why?")
    system = get_template("v1").system
    assert session.prompt == (
        f"{system} USER: <image>\nWhat is this? ASSISTANT: {first}</s>USER: And why? ASSISTANT: {second}</s>"
    )
    assert "</s>" not in first and session.sources == [str(photo)]  # the end token appears once


def test_a_second_turn_computes_its_new_tokens_only(session: ChatSession, engine: Engine, photo: Path) -> None:
    session.attach(str(photo))
    say(session, "What is this? " * 10)
    before, whole = engine.statistics(), session.ask("And why?")
    session.add_answer(whole.result())
    after = engine.statistics()
    new = after.computed_tokens - before.computed_tokens
    assert after.encoded_images == before.encoded_images
    assert (
        new < 60 < whole.prompt_tokens / 2 and after.cached_tokens - before.cached_tokens >= whole.prompt_tokens - new
    )


def test_answers_equal_the_engines(session: ChatSession, engine: Engine, photo: Path) -> None:
    session.attach(str(photo))
    text = say(session, "What is this?")
    prompt = f"{get_template('v1').system} USER: <image>\nWhat is this? ASSISTANT:"
    params = SamplingParams(6, stop=stop_strings(get_template("v1")))
    assert engine.generate([Request(prompt, [Image.open(photo).convert("RGB")], params)])[0].text == text


def test_a_second_image_joins_and_warns(session: ChatSession, photo: Path, caplog: pytest.LogCaptureFixture) -> None:
    session.attach(str(photo))
    say(session, "one")
    assert "single images" not in caplog.text
    session.attach(str(photo))
    assert "single images" in caplog.text
    say(session, "Compare <image> with the first.")
    assert session.prompt.count("<image>") == 2 and len(session.images) == 2


def test_a_placeholder_without_image_is_refused_and_forgotten(session: ChatSession) -> None:
    before = session.prompt
    with pytest.raises(RequestError, match="1 <image> placeholder.*0 image"):
        session.ask("Look at <image> this")
    assert session.prompt == before
    assert say(session, "still alive?") is not None


def test_a_full_context_is_said_and_survived(session: ChatSession) -> None:
    with pytest.raises(RequestError, match="tokens long"):
        session.ask("why " * 3000)
    session.clear()
    say(session, "short")


def test_clear_keeps_the_users_system_message(session: ChatSession, photo: Path) -> None:
    session.set_system("Answer briefly.")
    session.attach(str(photo))
    say(session, "hello")
    session.clear()
    assert session.prompt == "Answer briefly. " and session.images == session.sources == []


def test_a_system_message_keeps_the_role_header(engine: Engine) -> None:
    session = ChatSession(engine, "Hermes-2", SamplingParams(2), "Be kind.")
    assert session.prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_a_cancelled_answer_is_kept_or_the_question_taken_back(session: ChatSession, photo: Path) -> None:
    session.attach(str(photo))
    handle = session.ask("hello")
    handle.cancel()
    session.add_answer(handle.result())
    assert session.conversation.messages == [] and session.images == []
    assert say(session, "again") and session.prompt.count("<image>") == 1  # the image is still attached


def test_saved_conversation(session: ChatSession, photo: Path, tmp_path: Path) -> None:
    session.attach(str(photo))
    answer = say(session, "What?")
    session.save(tmp_path / "chat.json")
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert saved["messages"] == [["USER", "<image>\nWhat?"], ["ASSISTANT", answer]]
    assert saved["images"] == [str(photo)] and saved["template"] == "v1"
    with pytest.raises(ConfigError, match="Cannot write"):
        session.save(tmp_path / "no" / "chat.json")


def test_settings_are_checked() -> None:
    params = parse_setting(SamplingParams(), "temperature = 0.5")
    assert params.temperature == 0.5 and parse_setting(params, "max_new_tokens=3").max_new_tokens == 3
    for wrong in ("temperature", "heat=3", "top_p=high"):
        with pytest.raises(ConfigError):
            parse_setting(params, wrong)
    with pytest.raises(RequestError, match="temperature"):
        parse_setting(params, "temperature=-1")


def test_commands(session: ChatSession, photo: Path, tmp_path: Path) -> None:
    assert "next message" in command(session, f"/image {photo}")
    assert command(session, "/set temperature=0") and session.params.temperature == 0
    assert session.params.stop == ("</s>",)
    assert command(session, "/system Be brief.") and session.prompt.startswith("Be brief.")
    assert command(session, f"/save {tmp_path / 'x.json'}") and (tmp_path / "x.json").is_file()
    assert command(session, "/reset") and not session._attached
    assert "/image PATH" in command(session, "/help")
    for wrong in ("/image", "/nonsense", "/clearx"):
        assert "not a command, or its argument is missing" in command(session, wrong)


@pytest.mark.parametrize(
    ("role", "name"),
    [("USER", "USER"), ("<|im_start|>user\n", "user"), ("<|User|>", "User"), ("<human>", "human"), ("", "user")],
)
def test_role_names(role: str, name: str) -> None:
    assert role_name(role) == name


@pytest.mark.parametrize(
    ("config", "stage_one"),
    [
        ({"conv_template": "plain"}, True),
        ({"tune_mm_mlp_adapter": True}, True),
        ({"conv_template": "v1"}, False),
        ({}, False),
    ],
)
def test_stage_one_is_told_by_the_config(config: dict[str, Any], stage_one: bool) -> None:
    assert is_stage_one(SimpleNamespace(**config)) is stage_one


def test_addresses_go_through_the_guarded_fetcher(photo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(chat, "fetch_image", lambda url: (asked.append(url), Image.new("RGB", (2, 2)))[1])
    assert load_image("https://example.org/a.png").size == (2, 2)
    local = tmp_path / "https.png"
    shutil.copy(photo, local)
    assert load_image(str(local)).size == (40, 30) and asked == ["https://example.org/a.png"]
    monkeypatch.undo()
    for unsafe in ("https://127.0.0.1/a.png", "http://localhost/a.png", "https://169.254.169.254/latest"):
        with pytest.raises(ImageError):
            load_image(unsafe)


def test_interrupt_cancels_then_leaves(engine: Engine) -> None:
    handle = engine.submit(Request([1, 300], params=SamplingParams(1000)))
    before = signal.getsignal(signal.SIGINT)
    with interrupt_cancels(handle):
        engine.step()
        signal.raise_signal(signal.SIGINT)
        assert handle.cancelled
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert handle.result().finish_reason == "cancelled"


# --- one answer, and a file of prompts ------------------------------------------------------------------------------


def test_one_prompt_as_text_and_json(
    tiny_dirs: dict[str, Path], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model-path", str(tiny_dirs["chat"]), "--device", "cpu", "--temperature", "0", "--max-new-tokens", "5"]
    ask = [*flags, "--image-file", str(photo), "--image", str(photo), "--prompt", "Compare"]
    status, out, _ = run_main(ask, capsys)
    assert status == 0
    status, as_json, _ = run_main([*ask, "--json"], capsys)
    answer = json.loads(as_json)
    assert answer["text"] == out.removesuffix("\n") and answer["images"] == [str(photo)] * 2
    assert answer["finish_reason"] in ("stop", "length") and answer["prompt_tokens"] > 32
    assert answer["template"] == "v1" and 1 <= answer["completion_tokens"] <= 5
    status, out, error = run_main([*ask, "--debug"], capsys)
    assert status == 0 and "'prompt': \"A chat" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "a.jsonl"], "--input and --output require each other"),
        (["--json"], "--json requires --prompt"),
        (["--input", "a", "--output", "b", "--prompt", "c"], "--input cannot be combined"),
        (["--temperature", "nan"], "temperature must be in [0, 100] (0 decodes greedily), got nan"),
        (["--image-file", "nowhere.png", "--prompt", "x"], "nowhere.png"),
        (["--input", "nowhere.jsonl", "--output", "b"], "nowhere.jsonl is not a file"),
        (["--conv-mode", "v1x", "--prompt", "x"], "the nearest is"),
        (["--device", "quantum"], "device"),
    ],
)
def test_faults_are_one_sentence(
    tiny_dirs: dict[str, Path], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run_main(["--model-path", str(tiny_dirs["chat"]), *flags], capsys)
    assert status == 2
    assert error.splitlines()[-1].startswith("error: ") and message in error.splitlines()[-1]
    assert "nowhere" not in message or "Loading" not in error  # what can be seen before the model is loaded


def test_a_file_of_prompts_is_answered_and_resumed(
    tiny_dirs: dict[str, Path], photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "What is this?", "image": str(photo)},
        {"id": "b", "text": "Compare", "images": [str(photo), str(photo)]},
        {"prompt": "Hello"},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model-path", str(tiny_dirs["chat"]), "--device", "cpu", "--temperature", "0", "--max-new-tokens", "5"]
    flags += ["--input", str(source), "--output", str(output)]
    assert run_main(flags, capsys)[0] == 0
    whole = output.read_bytes()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [answer["question_id"] for answer in answers] == [0, "b", 2]
    assert answers[1]["images"] == [str(photo)] * 2 and answers[0]["text"]
    output.write_bytes(whole[: len(whole) - 30])
    status, _, error = run_main(flags, capsys)
    assert status == 0 and "1 answered" in error and "2 resumed" in error and output.read_bytes() == whole
    source.write_text('{"image": "x.png"}\n')
    assert "line 1 must have a string `prompt`" in run_main([*flags, "--overwrite"], capsys)[2]


def test_failed_prompts_are_retried(
    tiny_dirs: dict[str, Path], photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output, late = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "late.png"
    rows = [{"prompt": "Hi"}, {"id": "late", "prompt": "What?", "image": str(late)}, {"prompt": "Bye"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model-path", str(tiny_dirs["chat"]), "--device", "cpu", "--temperature", "1", "--seed", "3"]
    flags += ["--max-new-tokens", "5", "--input", str(source), "--output", str(output)]
    status, _, error = run_main(flags, capsys)
    assert status == 1 and "failed: prompt late: " in error and "1 prompt(s) failed" in error
    first = [json.loads(line) for line in output.read_text().splitlines()]
    assert first[1]["text"] == "" and "no such file" in first[1]["metadata"]["error"]
    shutil.copy(photo, late)
    status, _, error = run_main(flags, capsys)
    assert status == 0 and "1 answered" in error and "2 resumed" in error
    second = [json.loads(line) for line in output.read_text().splitlines()]
    assert [second[0], second[2]] == [first[0], first[2]] and second[1]["text"] and second[1]["metadata"] == {}
    assert not output.with_name("out.jsonl.retry").exists()
    assert run_main([*flags, "--overwrite", "--batch-size", "1"], capsys)[0] == 0  # a seed does not depend on the batch
    assert [json.loads(line) for line in output.read_text().splitlines()] == second


def test_answers_of_other_settings_or_prompts_are_not_continued(
    tiny_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Hi"}\n')
    flags = ["--model-path", str(tiny_dirs["chat"]), "--device", "cpu", "--max-new-tokens", "2"]
    flags += ["--input", str(source), "--output", str(output)]
    assert run_main(flags, capsys)[0] == 0
    whole = output.read_bytes()
    assert "has decoding" in run_main([*flags, "--temperature", "0.5"], capsys)[2]
    assert "has dtype" in run_main([*flags, "--dtype", "bfloat16"], capsys)[2]
    assert "has quantization" in run_main([*flags, "--load-8bit"], capsys)[2]
    other = tmp_path / tiny_dirs["chat"].name
    shutil.copytree(tiny_dirs["chat"], other)
    (other / "generation_config.json").write_text('{"_from_model_config": true}')
    assert "has checkpoint" in run_main([*flags, "--model-path", str(other)], capsys)[2]
    source.write_text('{"prompt": "Bye"}\n')
    assert "line 1 does not answer prompt 1" in run_main(flags, capsys)[2]
    with output.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "Another process is writing" in run_main([*flags, "--overwrite"], capsys)[2]
    output.with_name("out.jsonl.manifest.json").unlink()
    assert "with its settings cannot be read" in run_main(flags, capsys)[2]
    assert output.read_bytes() == whole
    assert run_main([*flags, "--overwrite"], capsys)[0] == 0 and json.loads(output.read_text())["prompt"] == "Bye"


def test_stage_one_says_so(tiny_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "stage-one"
    shutil.copytree(tiny_dirs["chat"], directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "conv_template": "plain"}))
    flags = ["--model-path", str(directory), "--device", "cpu", "--max-new-tokens", "2", "--prompt", "", "--json"]
    status, _, error = run_main(flags, capsys)
    assert status == 0 and "stage-1 checkpoint" in error and "expect captions" in error


# --- real processes -------------------------------------------------------------------------------------------------


def test_a_piped_conversation(
    chat_command: list[str], child_environment: dict[str, str], photo: Path, tmp_path: Path
) -> None:
    lines = ["Look: <image>", f"/image {photo}", "What is this?", "/image nowhere.png", "Why?"]
    lines += [f"/save {tmp_path / 'c.json'}", "/clear"]
    result = subprocess.run(
        [*chat_command, "--max-new-tokens", "5", "--temperature", "0", "--debug"],
        input="\n".join(lines), capture_output=True, text=True, env=child_environment, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "nowhere.png: no such file" in result.stdout and result.stdout.count("ASSISTANT: ") >= 2
    assert result.stdout.rstrip().endswith("Goodbye.") and "USER: error: The prompt has 1 <image>" in result.stdout
    saved = json.loads((tmp_path / "c.json").read_text())
    assert len(saved["messages"]) == 4 and saved["messages"][0][1] == "<image>\nWhat is this?"
    assert "Traceback" not in result.stderr


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execve(argv[0], argv, {**environment, "TERM": "dumb"})
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def expect(self, text: str, seconds: float = 60) -> None:
        """Read until `text` appears after the previously expected text."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            self._read(deadline)
        self.seen = self.seen.partition(text)[2]

    def expect_more(self, characters: int, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while len(self.seen) < characters:
            self._read(deadline)

    def _read(self, deadline: float) -> None:
        ready, _, _ = select.select([self.descriptor], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"Nothing more came after {self.seen!r}"
        try:
            self.seen += os.read(self.descriptor, 4096).decode(errors="replace")
        except OSError as error:  # the other end is closed
            raise AssertionError(f"The program ended after {self.seen!r}") from error

    def poll(self, seconds: float) -> int | None:
        """The exit status, None if the program is still running after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return None


@pytest.fixture
def terminal(chat_command: list[str], child_environment: dict[str, str]) -> Iterator[Terminal]:
    chat = Terminal([*chat_command, "--max-new-tokens", "1500", "--temperature", "0"], child_environment)
    yield chat
    os.close(chat.descriptor)


@pytest.mark.slow
def test_interrupt_in_a_terminal(terminal: Terminal) -> None:
    terminal.expect("USER: ")
    terminal.type("Describe everything\n")
    terminal.expect("ASSISTANT: ")
    terminal.expect_more(10)  # it is streaming
    terminal.type("\x03")
    terminal.expect("[stopped]", seconds=20)
    terminal.expect("USER: ")
    terminal.type("/set max_new_tokens=3\n")
    terminal.expect("Set max_new_tokens=3")
    terminal.expect("USER: ")
    terminal.type("And now?\n")
    terminal.expect("ASSISTANT: ")
    terminal.expect("USER: ")
    terminal.type("\x04")
    terminal.expect("Goodbye.")
    assert terminal.poll(seconds=30) == 0


def test_interrupt_at_the_prompt_leaves(terminal: Terminal) -> None:
    terminal.expect("USER: ")
    deadline = time.monotonic() + 60
    status = None
    while status is None:
        assert time.monotonic() < deadline
        # Line editing misses a signal that comes between its check and its wait: press again, as people do.
        terminal.type("\x03")
        status = terminal.poll(seconds=10)
    assert status == 130
