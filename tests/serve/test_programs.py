"""Controller and worker as processes on the tiny model: published commands, any start order, openai's own client."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from llava.conversation import RenderedPrompt
from llava.engine import Engine, Request, SamplingParams
from llava.eval import main as evaluate
from llava.mm_utils import encode_prompt
from llava.serve.common.openai_chat import ChatMessage, render_chat
from tests.eval.benchdata import BENCHMARKS
from tests.eval.conftest import read_jsonl
from tests.serve.programs import START, Program, alive, children, program
from tests.serve.stubs import b64, frames_of, generate, png, post, until

NAME = "internvl-chat-tiny"


@pytest.fixture(scope="module")
def environment(child_environment: dict[str, str]) -> dict[str, str]:
    clean = {key: value for key, value in child_environment.items() if not key.startswith("LLAVA_")}
    return {**clean, "NO_PROXY": "*"}


@pytest.fixture(scope="module")
def stack(environment: dict[str, str], tiny_dirs: dict[str, Path]) -> Iterator[tuple[Program, Program]]:
    """The documented pair of commands, on free ports."""
    with program(environment, "controller", "--host", "0.0.0.0", "--port", "0") as controller:
        words = ["--host", "0.0.0.0", "--controller", controller.url, "--port", "0", "--device", "cpu"]
        words += ["--model-path", f"{tiny_dirs['chat']}/", "--multi-modal"]
        with program(environment, "model_worker", *words) as worker:
            until(lambda: post(controller.url, "/list_models").json()["models"] == [NAME], START)
            yield controller, worker


@pytest.fixture
def client(stack: tuple[Program, Program]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack[0].url}/v1", api_key="none", max_retries=0, timeout=60) as api:
        yield api


def image_part(color: tuple[int, int, int] = (200, 30, 30)) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64(png())}}


def test_the_documented_commands_listen_here_only_and_say_so(stack: tuple[Program, Program]) -> None:
    for part in stack:
        assert "listening on 127.0.0.1" in part.text
        assert "LLAVA_TOKEN" in part.text


def test_old_clients_get_the_same_tokens_as_the_engine(stack: tuple[Program, Program], engine: Engine) -> None:
    address = post(stack[0].url, "/get_worker_address", {"model": NAME}).json()["address"]
    prompt = "USER: <image>\nWhat color is the shape? ASSISTANT:"
    data = png(30, 20)
    body = {"model": NAME, "prompt": prompt, "temperature": 0.0, "max_new_tokens": 12, "stop": "</s>"}
    frames = frames_of(generate(address, {**body, "images": [b64(data)]}))
    from llava.images import open_image

    expected = engine.generate([Request(prompt, [open_image(data)], SamplingParams(12, stop=("</s>",)))])[0]
    assert frames[-1]["text"][len(prompt) :].strip() == expected.text, stack[1].text
    assert frames[-1]["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert frames[-1]["usage"]["image_tokens"] == 16
    through = frames_of(generate(stack[0].url, {**body, "images": [b64(data)]}))
    assert through[-1]["text"] == frames[-1]["text"]


def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_openai_answers_and_streams_the_same(client: openai.OpenAI, engine: Engine) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image_part(), {"type": "text", "text": "What color?"}]},
    ]
    whole = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=10)
    pieces = list(
        client.chat.completions.create(
            model=NAME,
            messages=messages,
            temperature=0,
            max_tokens=10,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    rendered = render_chat([ChatMessage.model_validate(message) for message in messages], "v1")
    from llava.images import open_image

    params = SamplingParams(10, stop=tuple(rendered.stop))
    expected = engine.generate([Request(rendered.prompt, [open_image(png())], params)])[0]
    assert whole.choices[0].message.content == text == expected.text
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == expected.prompt_tokens
    assert whole.usage.total_tokens == expected.prompt_tokens + len(expected.token_ids)
    assert pieces[-1].usage == whole.usage
    assert whole.choices[0].finish_reason in ("length", "stop")


def test_openai_takes_several_images_seed_and_stop(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": [image_part(), {"type": "text", "text": "Compare with"}, image_part()]}]
    settings = {"model": NAME, "messages": messages, "temperature": 1.0, "top_p": 0.9, "max_tokens": 8}
    first, second = (client.chat.completions.create(seed=3, stop=["zzz"], **settings) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.prompt_tokens_details is not None


def test_openai_gets_errors_as_its_own_exceptions(client: openai.OpenAI) -> None:
    user = {"role": "user", "content": "word " * 3000}
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model=NAME, messages=[user])
    assert too_long.value.code == "context_length_exceeded"
    assert too_long.value.param == "messages" and too_long.value.body["error_type"] == "context_length_exceeded"
    assert "This model's maximum context length is 2048 tokens. However, you requested" in too_long.value.message
    assert too_long.value.message.endswith("[context_length_exceeded]")
    assert too_long.value.body["context_length"] == 2048
    assert too_long.value.body["prompt_tokens"] > 2048
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nothing", messages=[{"role": "user", "content": "hi"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="body: modalities is not supported; omit it") as unserved:
        client.chat.completions.create(model=NAME, modalities=["audio"], messages=[{"role": "user", "content": "hi"}])
    assert unserved.value.param == "modalities"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, top_p=2, messages=[{"role": "user", "content": "hi"}])
    assert bad.value.param == "top_p"
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"no").decode()}}
    with pytest.raises(openai.BadRequestError, match="Cannot read the given image") as damaged:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": [part]}])
    assert (damaged.value.code, damaged.value.body["error_type"]) == ("invalid_image", "bad_image")


def test_openai_completes_texts_and_token_ids_as_the_engine_does(client: openai.OpenAI, engine: Engine) -> None:
    prompt = "The  sky"
    expected = engine.generate([Request(prompt, params=SamplingParams(8))])[0]
    ids = encode_prompt(prompt, engine.tokenizer)
    text = engine.tokenizer.decode([*ids, *expected.token_ids], skip_special_tokens=True)
    for given in (prompt, ids):
        settings = {"model": NAME, "prompt": given, "temperature": 0, "max_tokens": 8, "echo": True}
        whole = client.completions.create(**settings)
        chunks = client.completions.create(stream=True, **settings)
        streamed = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        assert whole.choices[0].text.removeprefix("<s> ") == streamed.removeprefix("<s> ") == text
        assert whole.usage.prompt_tokens == expected.prompt_tokens
    biased = {"model": NAME, "logit_bias": {str(engine.tokenizer.convert_tokens_to_ids("▁the")): 100}, "max_tokens": 2}
    assert client.completions.create(prompt=prompt, **biased).choices[0].text == " the the"
    chat = [{"role": "user", "content": prompt}]
    assert client.chat.completions.create(messages=chat, **biased).choices[0].message.content == "the the"


def test_openai_responses_are_those_of_the_chat(client: openai.OpenAI) -> None:
    chat = [{"role": "user", "content": [image_part(), {"type": "text", "text": "What color?"}]}]
    expected = client.chat.completions.create(model=NAME, messages=chat, temperature=0, max_tokens=10)
    image = {"type": "input_image", "image_url": "data:image/png;base64," + b64(png()), "detail": "auto"}
    content = [image, {"type": "input_text", "text": "What color?"}]
    settings = {"model": NAME, "input": [{"role": "user", "content": content}], "temperature": 0}
    whole = client.responses.create(**settings, max_output_tokens=10)
    with client.responses.stream(**settings, max_output_tokens=10) as stream:
        events = list(stream)
    assert whole.output_text == events[-1].response.output_text == expected.choices[0].message.content
    assert whole.usage == events[-1].response.usage
    assert whole.usage.input_tokens == expected.usage.prompt_tokens
    assert whole.usage.to_dict()["input_tokens_details"]["image_tokens"] == 16


def test_tokens_are_those_of_the_engine(stack: tuple[Program, Program], client: openai.OpenAI, engine: Engine) -> None:
    url = stack[0].url
    text = "Hello  <image> </s> wörld 漢"
    reply = post(url, "/tokenize", {"prompt": text, "return_token_strs": True}).json()
    ids = encode_prompt(RenderedPrompt(text, [(7, 14)]), engine.tokenizer)
    assert (reply["tokens"], reply["count"], reply["max_model_len"]) == (ids, len(ids), 2048)
    assert reply["token_strs"] == engine.tokenizer.convert_ids_to_tokens(ids)
    bare = post(url, "/tokenize", {"model": NAME, "prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == ids[1:]
    back = post(url, "/detokenize", {"model": NAME, "tokens": ids[1:]}).json()
    assert back["prompt"] == engine.tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False)
    messages = [{"role": "user", "content": [image_part(), {"type": "text", "text": "What color?"}]}]
    counted = post(url, "/tokenize", {"model": NAME, "messages": messages}).json()
    usage = client.chat.completions.create(model=NAME, messages=messages, max_tokens=1).usage
    assert counted["count"] == usage.prompt_tokens and counted["tokens"].count(-200) == 1
    assert "<image>\nWhat color?" in post(url, "/detokenize", {"tokens": counted["tokens"]}).json()["prompt"]
    wrong = post(url, "/detokenize", {"model": NAME, "tokens": [10**6]})
    assert wrong.status_code == 400 and "tokens must be in [0, " in wrong.json()["error"]["message"]
    long = post(url, "/tokenize", {"prompt": "x" * 100_000})
    assert long.json()["error"]["code"] == "context_length_exceeded"


def test_llava_eval_asks_this_server_and_gets_the_answers_of_its_own_run(
    stack: tuple[Program, Program], tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights and the same questions: `--api-base` and `--model-path` write the same answers."""
    monkeypatch.setenv("NO_PROXY", "*")
    tasks = ("gqa", "science_qa", "pope")
    for folder, _, make in map(BENCHMARKS.__getitem__, tasks):
        (tmp_path / folder).mkdir()
        make(tmp_path / folder)
    flags = ["--tasks", ",".join(tasks), "--eval-data", str(tmp_path), "--max-new-tokens", "12", "--output-dir"]

    def answers(output: Path, *model: str) -> list[tuple[str, str]]:
        assert evaluate.main([*flags, str(output), *model]) == 0
        rows = [row for task in tasks for row in read_jsonl(output / task / "answers.jsonl")]
        return [(row["question_id"], row["text"]) for row in rows]

    asked = answers(tmp_path / "server", "--api-base", f"{stack[0].url}/v1")
    assert asked == answers(tmp_path / "local", "--model-path", str(tiny_dirs["chat"]), "--device", "cpu")
    assert len(asked) == 15 and len({text for _, text in asked}) > 2


def test_every_part_is_watched(stack: tuple[Program, Program]) -> None:
    for part in stack:
        assert httpx.get(f"{part.url}/health", trust_env=False).status_code == 200
        until(lambda part=part: httpx.get(f"{part.url}/ready", trust_env=False).status_code == 200)
        assert "llava_requests_total" in httpx.get(f"{part.url}/metrics", trust_env=False).text
        assert "What color" not in part.text


@pytest.mark.slow
def test_check_20_a_worker_comes_before_its_controller_and_leaves_when_its_answers_are_complete(
    environment: dict[str, str], tiny_dirs: dict[str, Path]
) -> None:
    with program(environment, "controller", "--port", "0") as first:
        address = first.url
        assert first.stop() == 0
    port = address.rpartition(":")[2]
    words = ["--controller", address, "--port", "0", "--device", "cpu", "--model-path", str(tiny_dirs["chat"])]
    with program(environment, "model_worker", *words) as worker:
        until(lambda: "next try" in worker.text, START)
        with program(environment, "controller", "--port", port) as controller:
            until(lambda: post(controller.url, "/list_models").json()["models"] == [NAME], START)
            check_20(worker)
            assert post(controller.url, "/list_models").json()["models"] == []
            assert controller.stop(signal.SIGINT) == 0


def check_20(worker: Program) -> None:
    """SIGTERM during an answer: the answer is completed, new requests get 503, then the process exits with 0."""
    body = {"model": NAME, "prompt": "USER: go on ASSISTANT:", "max_new_tokens": 1024, "temperature": 1.0, "seed": 1}
    address = worker.url
    with httpx.stream("POST", f"{address}/worker_generate_stream", json=body, timeout=START) as running:
        received = running.iter_raw()
        first = next(received)
        assert b"finish_reason" not in first
        started = children(worker.process.pid)
        worker.process.send_signal(signal.SIGTERM)
        until(lambda: "Stopping" in worker.text)
        refused = generate(address, {**body, "max_new_tokens": 1})
        assert (refused.status_code, frames_of(refused)[0]["error"]["type"]) == (503, "not_ready")
        frames = [json.loads(frame) for frame in b"".join([first, *received]).split(b"\0") if frame]
    assert frames[-1]["finish_reason"] in ("length", "stop")
    assert worker.process.wait(START) == 0
    until(lambda: not any(map(alive, started)))


def test_a_port_that_is_taken_is_one_sentence(environment: dict[str, str], stack: tuple[Program, Program]) -> None:
    port = stack[0].url.rpartition(":")[2]
    with program(environment, "controller", "--port", port) as second:
        assert second.process.wait(START) == 2
        until(lambda: "choose another --port" in second.text)
        assert "Traceback" not in second.text


def test_another_address_without_a_token_is_refused(environment: dict[str, str]) -> None:
    with program(environment, "controller", "--host", "192.0.2.1", "--port", "0") as refused:
        assert refused.process.wait(START) == 2
        until(lambda: "--insecure" in refused.text)
