"""Serving checks 7, 12–15 and 17–20: slots, cancellation, overload, deadlines, health, shutdown."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import socket
import threading
from collections.abc import Callable

import httpx
import pytest

from llava.engine.statistics import Statistics
from llava.serve.common.protocol import WorkerStatus
from llava.serve.control.worker_client import Timeouts
from llava.serve.worker.local_backend import BackendSettings
from llava.serve.worker.metrics import EngineCollector
from tests.serve.stubs import (
    MODEL,
    PATIENCE,
    TLS,
    LiveWorker,
    StubEngine,
    b64,
    decoy,
    frames_of,
    generate,
    get,
    live_controller,
    live_worker,
    make_worker,
    png,
    post,
    request_body,
    until,
)

ROUNDS = int(os.environ.get("LLAVA_ROUNDS", "12"))  # the 100 of the table: LLAVA_ROUNDS=100


LARGE_IMAGE = b64(png(1000, 1000))


def drop_after(url: str, frames: int, body: dict[str, object]) -> None:
    """Start a stream and disconnect after `frames` frames."""
    with httpx.stream("POST", f"{url}/worker_generate_stream", json=body, timeout=PATIENCE, verify=TLS) as response:
        seen = 0
        for data in response.iter_raw():
            seen += data.count(b"\0")
            if seen >= frames:
                return


def drop_when(url: str, event: threading.Event, body: dict[str, object]) -> None:
    """Start a stream and disconnect when the event is set."""
    with httpx.stream("POST", f"{url}/worker_generate_stream", json=body, timeout=PATIENCE, verify=TLS) as response:
        for _ in response.iter_raw():
            if event.is_set():
                return


def in_background(count: int, work: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_check_07_a_stream_outlives_the_controller_and_the_worker_returns_to_it() -> None:
    engine = StubEngine()
    engine.gate.clear()
    with live_controller() as first, live_worker(engine, controller=first.url) as worker:
        until(lambda: first.registry.models() == [MODEL])
        answers: list[httpx.Response] = []
        (stream,) = in_background(1, lambda: answers.append(generate(worker.url, request_body(tokens=5))))
        until(lambda: worker.in_use == 1)
        first.live.stop()
        heart = worker.worker.heartbeat
        assert heart is not None
        until(lambda: not heart.registered)
        engine.gate.set()
        stream.join()
        assert frames_of(answers[0])[-1]["finish_reason"] == "length"
        with live_controller() as second:
            heart._client.base_url = httpx.URL(second.url)
            until(lambda: second.registry.models() == [MODEL])
            assert second.registry.remove(worker.url)  # the worker registers again
            until(lambda: second.registry.models() == [MODEL])


def disconnects(worker: LiveWorker) -> None:
    drop_after(worker.url, 2, request_body(tokens=100_000))


def completes(worker: LiveWorker) -> None:
    assert frames_of(generate(worker.url, request_body()))[-1]["finish_reason"] == "length"


def step_raises(worker: LiveWorker) -> None:
    worker.engine.step_error = RuntimeError("boom at 0xdeadbeef in /usr/lib/secret.py")
    frame = frames_of(generate(worker.url, request_body()))[-1]
    assert (frame["error_code"], frame["error"]["type"]) == (1, "internal")
    completes(worker)  # too many failures with no answer in between, and the engine is given up


def submit_raises(worker: LiveWorker) -> None:
    worker.engine.submit_error = RuntimeError("between acquire and return")
    assert generate(worker.url, request_body()).status_code == 500
    worker.engine.submit_error = None


def image_fails(worker: LiveWorker) -> None:
    assert generate(worker.url, request_body("<image>", images=[b64(b"not an image")])).status_code == 400


def memory_runs_out(worker: LiveWorker) -> None:
    worker.engine.step_error = MemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    frame = frames_of(generate(worker.url, request_body()))[-1]
    assert (frame["finish_reason"], frame["error"]["type"]) == ("error", "out_of_memory")
    completes(worker)


@pytest.mark.parametrize(
    "path",
    [completes, disconnects, step_raises, submit_raises, image_fails, memory_runs_out],
    ids=lambda f: f.__name__,
)
def test_check_12_the_slot_is_free_after_every_path(path: Callable[[LiveWorker], None]) -> None:
    with live_worker(
        StubEngine(pause=0.001), BackendSettings(limit=2, queue_limit=1, max_new_tokens=1_000_000)
    ) as worker:
        for _ in range(ROUNDS):
            path(worker)
            until(lambda: worker.in_use == 0)
        completes(worker)
        until(lambda: worker.in_use == 0)
        assert worker.metric("llava_requests_in_use") == 0


def test_check_12_a_connection_that_closes_before_the_answer_begins_leaks_nothing() -> None:
    engine = StubEngine()
    engine.gate.clear()
    with live_worker(engine) as worker:
        host, port = worker.url.removeprefix("http://").split(":")
        body = json.dumps(request_body(tokens=1000)).encode()
        for _ in range(5):
            with socket.create_connection((host, int(port))) as sock:
                head = "POST /worker_generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        engine.gate.set()
        until(lambda: len(engine.history) >= 1)
        until(lambda: worker.in_use == 0)


def test_check_13_a_disconnect_stops_decoding_within_two_steps() -> None:
    engine = StubEngine(pause=0.05)
    with live_worker(engine) as worker:
        drop_after(worker.url, 3, request_body(tokens=10_000))
        job = engine.history[0]
        until(lambda: job.handle.cancelled)
        at_cancel = job.steps
        until(lambda: worker.in_use == 0)
        assert job.handle.completion is not None
        assert job.steps - at_cancel <= 2
        assert job.steps < 10_000


def test_check_13_a_disconnect_from_the_controller_stops_the_worker() -> None:
    engine = StubEngine(pause=0.01)
    with live_controller() as controller, live_worker(engine, controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        drop_after(controller.url, 3, request_body(tokens=100_000))
        until(lambda: engine.history[0].handle.completion is not None)
        until(lambda: worker.in_use == 0)
        until(lambda: controller.controller.streams == 0)
        assert engine.history[0].steps < 100_000


def test_check_14_overload_is_refused_at_once() -> None:
    engine = StubEngine(batch=1)
    engine.gate.clear()
    with live_worker(engine, BackendSettings(limit=1, queue_limit=1)) as worker:
        answers: list[httpx.Response] = []
        threads = in_background(10, lambda: answers.append(generate(worker.url, request_body())))
        until(lambda: len(answers) == 8)  # refused while the engine is blocked
        assert [answer.status_code for answer in answers] == [503] * 8
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers)
        assert {frames_of(answer)[0]["error"]["type"] for answer in answers} == {"overloaded"}
        with httpx.Client(timeout=PATIENCE, verify=TLS) as client:

            def slowest(status: int, path: str, body: object) -> float:
                answers = [client.post(worker.url + path, json=body) for _ in range(8)]
                assert {answer.status_code for answer in answers} == {status}
                return max(answer.elapsed.total_seconds() for answer in answers)

            def quick() -> bool:
                """Below 50 ms, or below twice the time of a status query on a busy machine."""
                refused = slowest(503, "/worker_generate_stream", request_body("<image>", images=[LARGE_IMAGE]))
                return refused < max(0.05, 2 * slowest(200, "/worker_get_status", None))

            until(quick)
        engine.gate.set()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [503] * 8
        until(lambda: worker.in_use == 0)
        for _ in range(10):
            assert generate(worker.url, request_body()).status_code == 200
            until(lambda: worker.in_use == 0)


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def test_check_15_a_worker_that_never_answers_is_given_up_and_one_that_stalls_too() -> None:
    frame = b'{"text": "hel", "error_code": 0}\0'
    stalling = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + frame
    for reply, codes in ((None, [3]), (stalling, [0, 3])):
        with live_controller(timeouts=Timeouts(idle=0.3)) as controller, decoy(reply) as worker:
            status = WorkerStatus(model_names=[MODEL], speed=1, queue_length=0)
            controller.registry.put(worker.url, True, status, probed=True)
            if reply is not None:
                worker.hold = True
            answer = generate(controller.url, request_body())
            frames = frames_of(answer)
            assert [f["error_code"] for f in frames] == codes
            assert frames[-1]["error"]["type"] == "timeout"
            assert answer.elapsed.total_seconds() < PATIENCE / 4
            assert post(controller.url, "/v1/chat/completions", CHAT).status_code == 504
            until(lambda: controller.controller.streams == 0)
            assert controller.metric("llava_requests_total", outcome="timeout") == 2


def test_check_15_waiting_too_long_for_the_first_token_ends_the_request() -> None:
    engine = StubEngine(batch=1, pause=0.01)
    with live_worker(engine, BackendSettings(1, 1, 10**6, keep_alive=0.05, queue_seconds=0.2)) as worker:
        stop = threading.Event()
        (stream,) = in_background(1, lambda: drop_when(worker.url, stop, request_body(tokens=10**6)))
        until(lambda: worker.metric("llava_requests_running") == 1)
        for _ in range(2):  # the second finds the waiting place free again
            answer = generate(worker.url, request_body())
            frames = frames_of(answer)
            assert frames[0] == {"text": "hello", "error_code": 0, "queue_position": 1}
            assert (len([f for f in frames if "error" in f]), frames[-1]["error"]["type"]) == (1, "timeout")
            assert answer.elapsed.total_seconds() < PATIENCE / 4
            until(lambda: worker.in_use == 1 and not engine.waiting)
        assert worker.metric("llava_requests_running") == 1, "the one in front goes on"
        assert (engine.history[1].steps, engine.history[2].steps) == (0, 0)
        stop.set()
        stream.join()
        until(lambda: worker.in_use == 0)


def test_check_15_an_answer_that_stalls_ends_in_one_error_frame() -> None:
    engine = StubEngine()

    def word(k: int) -> str:
        if k == 2:
            engine.gate.clear()  # the next step stands still
        return f"w{k} "

    engine.word = word
    with live_worker(engine, BackendSettings(keep_alive=0.05, total_seconds=0.3)) as worker:
        frames = frames_of(generate(worker.url, request_body(tokens=9)))
        assert "w0 w1 w2" in frames[-2]["text"]
        assert [frame.get("error", {}).get("type") for frame in frames[-2:]] == [None, "timeout"]
        engine.gate.set()
        until(lambda: worker.in_use == 0)


@pytest.mark.parametrize("word", ["é😀漢", "a\0b", '\\"\n', "x" * 1_000_000], ids=["utf8", "nul", "escapes", "1MB"])
def test_check_17_frames_carry_any_text(word: str) -> None:
    engine = StubEngine()
    engine.word = lambda k: word
    with live_worker(engine) as worker:
        response = generate(worker.url, request_body("", 1))
    raw = response.content.split(b"\0")
    assert raw[-1] == b""
    assert response.content.isascii()
    assert frames_of(response)[-1]["text"] == word


def test_check_18_health_is_not_readiness() -> None:
    engine = StubEngine()
    with live_worker(engine, token="secret") as worker:
        backend = worker.worker.backend
        states = {}
        scheduler, backend.scheduler = backend.scheduler, None  # type: ignore[attr-defined]
        states["loading"] = get(worker.url, "/ready")
        backend.scheduler = scheduler  # type: ignore[attr-defined]
        states["ready"] = get(worker.url, "/ready")
        worker.worker.draining = True
        states["draining"] = get(worker.url, "/ready")
        worker.worker.draining = False
        engine.step_error = RuntimeError("CUDA error: device-side assert triggered")
        headers = {"Authorization": "Bearer secret"}
        assert frames_of(generate(worker.url, request_body(), headers=headers))[-1]["error_code"] == 1
        until(lambda: backend.state == "failed")
        states["failed"] = get(worker.url, "/ready")
        assert {name: reply.status_code for name, reply in states.items()} == {
            "loading": 503,
            "ready": 200,
            "draining": 503,
            "failed": 503,
        }
        for name, reply in states.items():
            assert reply.json() == {"ready": name == "ready", "reason": "" if name == "ready" else name}
        assert get(worker.url, "/health").status_code == 200
        assert generate(worker.url, request_body(), headers=headers).status_code == 503


def test_check_19_the_counters_are_exact() -> None:
    engine = StubEngine(pause=0.001)
    with live_worker(engine, BackendSettings(limit=2, queue_limit=0, max_new_tokens=1_000_000)) as worker:
        for _ in range(4):
            generate(worker.url, request_body(tokens=2))
        until(lambda: worker.in_use == 0)
        for _ in range(3):
            drop_after(worker.url, 1, request_body(tokens=100_000))
            until(lambda: worker.in_use == 0)
        for _ in range(2):
            generate(worker.url, request_body("<image>"))
        engine.gate.clear()
        held = in_background(2, lambda: generate(worker.url, request_body(tokens=2)))
        until(lambda: worker.in_use == 2)
        assert generate(worker.url, request_body()).status_code == 503
        assert worker.metric("llava_requests_in_use") == 2
        engine.gate.set()
        for thread in held:
            thread.join()
        until(lambda: worker.metric("llava_requests_total", outcome="length") == 6)
        until(lambda: worker.metric("llava_requests_total", outcome="cancelled") == 3)
        assert worker.metric("llava_requests_total", outcome="image_count_mismatch") == 2
        assert worker.metric("llava_requests_total", outcome="overloaded") == 1
        assert worker.metric("llava_tokens_total", kind="completion") == 12
        assert worker.metric("llava_requests_in_use") == worker.metric("llava_requests_running") == 0
        page = get(worker.url, "/metrics").text
        assert 'llava_requests_total{outcome="cancelled"} 3.0' in page


def test_the_statistics_of_the_engine_are_exposed() -> None:
    """Nothing is exposed of an engine that is not loaded, and every field of one that is."""
    parts = {"tower": 0.5, "decode": 2.5}
    fields = {item.name: 10 + at for at, item in enumerate(dataclasses.fields(Statistics)) if item.name != "seconds"}
    engine = StubEngine()
    engine.statistics = lambda: Statistics(**fields, seconds=parts)  # type: ignore[method-assign,arg-type]
    backend = make_worker(engine).backend
    assert backend.statistics() is None and list(EngineCollector(backend.statistics).collect()) == []
    with live_worker(engine) as worker:
        page = get(worker.url, "/metrics").text
    shown = dict(re.findall(r"^(llava_\S+) (\S+)$", page, re.MULTILINE))
    names = {
        "requests": "queue_seconds_count", "waiting_seconds": "queue_seconds_sum", "max_batch_size": "max_batch_size",
        "prompt_tokens": "prefix_cache_queries_total", "cached_tokens": "prefix_cache_hits_total",
        "prefix_hits": "prefix_cache_hit_requests_total", "prefix_evictions": 'cache_evictions_total{cache="prefix"}',
        "prefill_chunks": "prefill_chunks_total",
        "images": "prompt_images_total", "encoded_images": "encoded_images_total",
        "feature_hits": "feature_cache_hits_total", "feature_evictions": 'cache_evictions_total{cache="feature"}',
        "generated_tokens": "generation_tokens_total", "decode_steps": "decode_steps_total",
        "decode_rows": "decode_rows_total", "kv_bytes": 'cache_bytes{cache="kv"}',
        "prefix_bytes": 'cache_bytes{cache="prefix"}', "feature_bytes": 'cache_bytes{cache="feature"}',
    }  # fmt: skip
    assert {name: float(shown[f"llava_{shown_as}"]) for name, shown_as in names.items()} == {
        name: fields[name] for name in names
    }
    assert set(fields) - set(names) == {"computed_tokens", "running", "waiting"}  # computed: queries without hits
    assert {part: float(shown[f'llava_engine_seconds_total{{part="{part}"}}']) for part in parts} == parts


def test_check_20_draining_finishes_what_runs_and_refuses_what_is_new() -> None:
    engine = StubEngine()
    engine.gate.clear()
    with live_controller() as controller, live_worker(engine, controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        answers: list[httpx.Response] = []
        (stream,) = in_background(1, lambda: answers.append(generate(worker.url, request_body(tokens=4))))
        until(lambda: worker.in_use == 1)
        scheduler = worker.worker.backend.scheduler  # type: ignore[attr-defined]
        drained = asyncio.run_coroutine_threadsafe(worker.worker.drain(PATIENCE), scheduler._loop)
        until(lambda: len(controller.registry) == 0)
        refused = generate(worker.url, request_body())
        assert (refused.status_code, frames_of(refused)[0]["error"]["type"]) == (503, "not_ready")
        assert post(worker.url, "/worker_get_status").json()["state"] == "draining"
        assert not drained.done()
        engine.gate.set()
        stream.join()
        assert frames_of(answers[0])[-1]["finish_reason"] == "length"
        drained.result(PATIENCE)
