"""Replies, streams and errors of servers with an OpenAI-compatible API, in the forms that engines and routers send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from llava.openai_protocol import ApiError, Dialect, Reply, ReplyReader, read_error, read_events, read_reply


def chunk(delta: Any = None, finish: Any = None, **more: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}, ensure_ascii=False)


def streamed(body: bytes, size: int) -> Reply:
    """The reply in a body that arrives in pieces of `size` bytes."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def read() -> Reply:
        reader = ReplyReader()
        texts = [reader.push(event) async for event in read_events(pieces())]
        reply = reader.finish()
        assert "".join(texts) == reply.text
        return reply

    return asyncio.run(read())


HELLO, STOP = chunk({"content": "grün\u2028😀"}), chunk({}, "stop")
STREAMS = {
    "no space": f"data:{HELLO}\n\ndata:{STOP}\n\ndata:[DONE]\n\n",
    "CR": f"data: {HELLO}\r\rdata: {STOP}\r\rdata: [DONE]\r\r",
    "CRLF": f"data: {HELLO}\r\n\r\ndata: {STOP}\r\n\r\ndata: [DONE]\r\n\r\n",
    "byte order mark": f"\ufeffdata: {HELLO}\n\ndata: {STOP}\n\n",
    "comments, id, retry": f": OPENROUTER PROCESSING\n\n: ping\nid: 7\nretry: 10\n\nid: 8\ndata: {HELLO}\n\n"
    f"data: {STOP}\n\n",
    "several lines": "".join(f"data: {line}\n" for line in json.dumps(json.loads(HELLO), indent=1).split("\n"))
    + f"\ndata: {STOP}\n\n",
    "no last blank line": f"data: {HELLO}\n\ndata: {STOP}",
    "no finish reason": f"data: {HELLO}\n\ndata: [DONE]\n\n",
    "empty finish reason": f"data: {chunk({'content': 'grün '[:4] + chr(0x2028) + '😀'}, '')}\n\ndata: [DONE]",
    "finish reason null as text": f"data: {chunk(json.loads(HELLO)['choices'][0]['delta'], 'null')}\n\ndata: [DONE]",
    "delta null": f"data: {HELLO}\n\ndata: {chunk(None, 'stop')}\n\n",
    "empty choices first": f'data: {{"choices":[],"prompt_filter_results":[]}}\n\ndata: {HELLO}\n\ndata: {STOP}\n\n',
    "usage null": f"data: {chunk(json.loads(HELLO)['choices'][0]['delta'], usage=None)}\n\ndata: {STOP}\n\n",
    "NaN": f"data: {HELLO[:-1]}, \"logprob\": NaN}}\n\ndata: {STOP}\n\n",
    "role only": f"data: {chunk({'role': 'assistant', 'content': None})}\n\ndata: {HELLO}\n\ndata: {STOP}\n\n",
    "parts": f"data: {chunk({'content': [{'type': 'text', 'text': 'grün'}, {'type': 'reference'}]})}\n\n"
    f"data: {chunk({'content': [chr(0x2028) + '😀']})}\n\ndata: {STOP}\n\n",
    "message after deltas": f"data: {HELLO}\n\n"
    + 'data: {"choices":[{"message":{"content":"all of it"},"finish_reason":"stop"}]}\n\n',
    "one object": '{"choices":[{"message":{"content":"grün\\u2028😀"},"finish_reason":"stop"}]}',
    "named event": f"event: message\ndata: {HELLO}\n\nevent: ping\ndata: {{\"type\": \"ping\"}}\n\ndata: {STOP}\n\n",
    "another choice": f'data: {{"choices":[{{"index":1,"delta":{{"content":"no"}}}}]}}\n\ndata: {HELLO}\n\n'
    f"data: {STOP}\n\n",
    "cut after the answer": f"data: {HELLO}\n\ndata: {STOP}\n\ndata: {{\"usage\": {{\"prom",
}  # fmt: skip


@pytest.mark.parametrize("form", STREAMS)
def test_a_stream_is_read_in_every_form_and_wherever_it_is_cut(form: str) -> None:
    body = STREAMS[form].encode()
    for reply in (read_reply(body), *(streamed(body, size) for size in (1, 2, 7, 10_000))):
        assert (reply.text, reply.finish_reason, reply.missing) == ("grün\u2028😀", "stop", None)


def test_usage_comes_from_any_chunk() -> None:
    usage = '{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"details":null}}'
    body = f"data: {HELLO}\n\ndata: {STOP}\n\ndata: {usage}\n\ndata: [DONE]\n\n"
    assert read_reply(body.encode()).usage == {"prompt_tokens": 3, "completion_tokens": 2}
    assert read_reply(f"data: {chunk({}, 'stop', usage=[])}\n\n".encode()).usage == {}


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        *((reason, "length") for reason in ("length", "max_tokens", "model_length", "MAX_TOKENS")),
        *((reason, "stop") for reason in ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "")),
        *((reason, "content_filter") for reason in ("content_filter", "SAFETY")),
        *((reason, "aborted") for reason in ("abort", "error", "cancelled")),
    ],
)
def test_reasons_to_finish_have_one_name(reason: str, finish: str) -> None:
    reply = read_reply(f"data: {HELLO}\n\ndata: {chunk({}, reason)}\n\ndata: [DONE]\n\n".encode())
    assert reply.finish_reason == finish


@pytest.mark.parametrize(
    ("message", "finish", "missing"),
    [
        ({"content": None}, "stop", "the reply is empty"),
        ({"content": " \n"}, "stop", "the reply is empty"),
        ({"content": []}, "stop", "the reply is empty"),
        ({}, None, "the reply is empty"),
        ({"content": None, "refusal": "I cannot."}, "stop", "the model refused: I cannot."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "stop", "the model refused: No."),
        ({"content": "", "tool_calls": [{"id": "1"}]}, "tool_calls", "the model called a tool"),
        ({"content": None, "function_call": {"name": "f"}}, "function_call", "the model called a tool"),
        ({"content": "part"}, "content_filter", "content filter withheld"),
        ({"content": "part"}, "abort", "the server aborted"),
        ({"content": "<think>hm"}, "length", "still thinking at the token limit"),
        ({"content": "", "reasoning_content": "hm"}, "length", "still thinking at the token limit"),
        ({"content": "<think>hm</think>\n"}, "stop", "thought but gave no answer"),
    ],
)
def test_the_absence_of_an_answer_has_a_name(message: dict[str, Any], finish: str | None, missing: str) -> None:
    body = json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode()
    assert missing in str(read_reply(body).split_thinking().missing)


@pytest.mark.parametrize(
    ("message", "text", "thinking"),
    [
        ({"content": "<think>\nno? yes\n</think>\n\nYes"}, "Yes", "no? yes"),
        ({"content": "no? yes</think>Yes"}, "Yes", "no? yes"),
        ({"content": "<thinking>a</thinking>Yes"}, "Yes", "a"),
        ({"content": "◁think▷a◁/think▷Yes"}, "Yes", "a"),
        ({"content": "Yes", "reasoning_content": "a"}, "Yes", "a"),
        ({"content": "Yes", "reasoning": "a", "reasoning_details": [{}]}, "Yes", "a"),
        ({"content": [{"type": "thinking", "thinking": [{"text": "a"}]}, {"text": "Yes"}]}, "Yes", "a"),
        ({"content": "Use the tag <think>a</think>."}, "Use the tag <think>a</think>.", ""),
        ({"content": "Yes \ud83d"}, "Yes \ufffd", ""),
    ],
)
def test_thinking_is_kept_apart(message: dict[str, Any], text: str, thinking: str) -> None:
    reply = read_reply(json.dumps({"choices": [{"message": message}]}).encode()).split_thinking()
    assert (reply.text.strip(), reply.thinking, reply.missing) == (text, thinking, None)


CONTEXT = "This model's maximum context length is 2048 tokens. However, you requested 2100 tokens."
ERRORS: list[tuple[Any, int, str, int]] = [
    ({"error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": None}}, 400, "No.", 400),
    ({"error": {"message": "No.", "code": 400}}, 200, "No.", 400),
    ({"error": {"message": "No.", "code": "429", "type": "x"}}, 200, "No.", 429),
    ({"error": {"message": "No.", "type": "BadRequestError"}}, 200, "No.", 400),
    ({"error": {"message": "No.", "code": "server_error"}}, 200, "No.", 500),
    ({"error": {"message": "Provider", "metadata": {"raw": "No."}}}, 502, "Provider: No.", 502),
    ({"error": "No.", "error_type": "overloaded"}, 200, "No.", 503),
    ({"error": "No."}, 404, "No.", 404),
    ({"object": "error", "message": "No.", "type": "BadRequestError", "code": 400}, 200, "No.", 400),
    ({"detail": "No."}, 404, "No.", 404),
    ({"detail": [{"loc": ["body", "top_k"], "msg": "No.", "input": "private"}]}, 422, "body.top_k: No.", 422),
    ({"statusCode": 401, "message": "No."}, 200, "No.", 401),
    ([{"error": {"code": 503, "message": "No.", "status": "UNAVAILABLE"}}], 200, "No.", 503),
    ("No.", 400, '"No."', 400),
]  # fmt: skip


@pytest.mark.parametrize(("body", "sent", "message", "status"), ERRORS, ids=str)
def test_the_reason_of_an_error_is_found_in_every_form(body: Any, sent: int, message: str, status: int) -> None:
    error = read_error(json.dumps(body).encode(), sent)
    assert (error.message, error.status) == (message, status)
    if sent == 200:
        for form in (json.dumps(body), f"data: {json.dumps(body)}\n\n", f"event: error\ndata: {json.dumps(body)}\n\n"):
            with pytest.raises(ApiError) as caught:
                read_reply(form.encode())
            assert (caught.value.message, caught.value.status) == (message, status)


def test_pages_of_proxies_are_reduced_to_their_title() -> None:
    page = b"<html><head><title>502 Bad\nGateway</title></head><body>at 10.0.0.1</body></html>"
    error = read_error(page, 502, {"Retry-After": "7"})
    assert (error.message, error.is_structured, error.is_transient) == ("502 Bad Gateway", False, True)
    assert error.retry_after == 7
    with pytest.raises(ApiError, match="502 Bad Gateway"):
        read_reply(page)
    assert len(read_error(b"x" * 9999, 400).message) < 600


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"3",
        b'{"choices": 3}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b'{"choices": [3]}',
        b"[" * 100_000,
        b"data: {not json\n\n",
        f"data: {HELLO}\n\n".encode(),
        f"data: {HELLO[:30]}".encode(),
        b"plain text",
    ],
    ids=lambda body: body[:40].decode(),
)
def test_malformed_and_incomplete_replies_are_errors(body: bytes) -> None:
    with pytest.raises(ApiError):
        read_reply(body)
    with pytest.raises(ApiError):
        streamed(body, 3 if len(body) < 1000 else 10_000)


@pytest.mark.parametrize(
    "text",
    [
        CONTEXT,
        "the request exceeds the available context size, try increasing it",
        "The input (3000 tokens) is longer than the model's context length (2048 tokens).",
        "Input tokens exceed the configured limit of 272000 tokens.",
        "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens and 20 `max_new_tokens`",
        "prompt is too long: 209303 tokens > 200000 maximum",
    ],
)
def test_overflows_of_the_context_are_recognized(text: str) -> None:
    assert read_error(json.dumps({"error": {"message": text}}).encode(), 400).is_context_overflow
    assert not read_error(json.dumps({"error": {"message": text}}).encode(), 429).is_context_overflow


def test_a_dialect_learns_names_from_refusals() -> None:
    request = {"max_tokens": 5, "stream_options": {"include_usage": True}, "top_p": 1}
    dialect = Dialect()
    for message, keys in (
        ("'max_tokens' or 'max_completion_tokens' is too large: 5", {"max_tokens", "stream_options", "top_p"}),
        ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
         {"max_completion_tokens", "stream_options", "top_p"}),
        ("body.stream_options: Extra inputs are not permitted", {"max_completion_tokens", "top_p"}),
        ("Unsupported: max_completion_tokens", {"max_completion_tokens", "top_p"}),
    ):  # fmt: skip
        dialect.learn(ApiError(message, 400), dialect.translate(request))
        assert dialect.translate(request).keys() == keys
