"""Serving checks 1–6 and 16: the controller never blocks and trusts no worker."""

from __future__ import annotations

import json
import random
import threading

import httpx
import pytest

from llava.serve.common.protocol import WorkerStatus
from llava.serve.common.security import AddressRule
from llava.serve.control.registry import Registry
from llava.serve.control.worker_client import Timeouts
from tests.serve.stubs import (
    MODEL,
    PATIENCE,
    TLS,
    StubEngine,
    decoy,
    frames_of,
    generate,
    get,
    http_reply,
    live_controller,
    live_worker,
    post,
    request_body,
    status_reply,
    until,
)

STATUS = {"model_names": [MODEL], "speed": 1, "queue_length": 0}


def registration(url: str, **more: object) -> dict[str, object]:
    return {"worker_name": url, "check_heart_beat": True, **more}


def test_check_01_a_worker_that_never_answers_blocks_nobody() -> None:
    """Registering, streaming and refreshing wait for it; listing models does not (p99 below 100 ms)."""
    with live_controller(timeouts=Timeouts(status=PATIENCE), sweep=0.05) as controller:
        stuck = []
        with decoy() as hole, httpx.Client(base_url=controller.url, timeout=PATIENCE, verify=TLS) as client:

            def slowest_of_fifty() -> float:
                replies = [client.post("/list_models") for _ in range(50)]
                assert {reply.status_code for reply in replies} == {200}
                return max(reply.elapsed.total_seconds() for reply in replies)

            def start(path: str, body: object = None) -> None:
                stuck.append(threading.Thread(target=post, args=(controller.url, path, body)))
                stuck[-1].start()

            before = slowest_of_fifty()
            for _ in range(4):
                start("/register_worker", registration(hole.url))
            until(lambda: hole.hits == 4)
            controller.registry.put(hole.url, False, status(), probed=True)
            start("/refresh_all_workers")
            start("/worker_generate_stream", request_body())
            until(lambda: hole.hits >= 6)

            until(lambda: slowest_of_fifty() < max(0.1, 3 * before))  # again, where the machine was busy with others
            assert all(thread.is_alive() for thread in stuck), "the registrations are still waiting"
        for thread in stuck:
            thread.join()


def test_check_02_registration_needs_the_token() -> None:
    with live_controller(token="right") as controller, decoy(status_reply()) as worker:
        body = registration(worker.url)
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert post(controller.url, "/register_worker", body, headers=headers).status_code == 401
        assert worker.hits == 0
        reply = post(controller.url, "/register_worker", body, headers={"Authorization": "Bearer right"})
        assert reply.json() == {"registered": True}
        assert b"Bearer right" in worker.received[0]


@pytest.mark.parametrize(
    "suffix",
    ["/admin", "/?x=1", "?x=", "#x", "/worker/../admin", "\\evil", " ", "/" + 300 * "a", "%2fadmin", ":0", ":99999999"],
)
def test_check_03_a_worker_address_is_only_an_address(suffix: str) -> None:
    with live_controller() as controller, decoy(status_reply()) as target:
        reply = post(controller.url, "/register_worker", registration(target.url + suffix))
        assert reply.status_code == 400
        assert target.hits == 0


def test_check_03_no_other_scheme_user_or_host() -> None:
    with live_controller(rule=AddressRule(["127.0.0.0/8", "gpu-*.example.org"])) as controller, decoy() as target:
        port = target.port
        for address in (
            "file:///etc/passwd",
            f"ftp://127.0.0.1:{port}",
            f"http://user:secret@127.0.0.1:{port}",
            f"http://@127.0.0.1:{port}",
            "http://",
            "http://169.254.169.254",
            f"http://[::ffff:169.254.169.254]:{port}",
            "http://other.example.org",
            f"http://0.0.0.0:{port}",
            f"http://2130706433:{port}",
        ):
            assert post(controller.url, "/register_worker", registration(address)).status_code == 400, address
        assert target.hits == 0
    assert AddressRule(["gpu-*.example.org"]).check("http://gpu-1.example.org:1/") == "http://gpu-1.example.org:1"


def test_check_03_redirects_are_not_followed() -> None:
    with decoy(status_reply()) as target:
        away = http_reply(b"", f"Location: {target.url}/worker_get_status", status="307 Temporary Redirect")
        with live_controller() as controller, decoy(away) as worker:
            assert post(controller.url, "/register_worker", registration(worker.url)).status_code == 502
            assert (worker.hits, target.hits) == (1, 0)


def test_check_04_what_a_worker_claims_is_not_trusted_without_asking_it() -> None:
    with (
        live_controller(timeouts=Timeouts(status=3)) as controller,
        decoy() as hole,
        decoy(status_reply("other")) as liar,
    ):
        claim = registration(hole.url, worker_status=STATUS)
        assert post(controller.url, "/register_worker", claim).json() == {"registered": False}
        post(controller.url, "/register_worker", registration(liar.url, worker_status=STATUS))
        assert post(controller.url, "/list_models").json() == {"models": ["other"]}
        assert post(controller.url, "/get_worker_address", {"model": MODEL}).json() == {"address": ""}
        frame = frames_of(generate(controller.url, request_body()))
        assert [f["error_code"] for f in frame] == [3]


def test_check_04_another_token_cannot_claim_a_served_model() -> None:
    with live_controller(token="right") as controller, live_worker(controller=controller.url, token="right") as good:
        until(lambda: controller.registry.models() == [MODEL])
        with decoy(status_reply()) as rival:
            headers = {"Authorization": "Bearer else"}
            reply = post(
                controller.url, "/register_worker", registration(rival.url, worker_status=STATUS), headers=headers
            )
            assert reply.status_code == 401
            assert {controller.registry.pick(MODEL) for _ in range(4)} == {good.url}


@pytest.mark.parametrize(
    "bad",
    [
        {"speed": 0},
        {"speed": -1},
        {"speed": float("nan")},
        {"speed": float("inf")},
        {"speed": "1"},
        {"queue_length": -1},
        {"queue_length": None},
        {"model_names": ["m"] * 100_000},
        {"model_names": "stub"},
        {"model_names": [""]},
    ],
    ids=str,
)
def test_check_05_bad_worker_data_is_refused_and_harms_nobody(bad: dict[str, object]) -> None:
    with live_controller() as controller, decoy(status_reply()) as good:
        assert post(controller.url, "/register_worker", registration(good.url)).status_code == 200
        body = json.dumps(registration("http://127.0.0.1:9", worker_status={**STATUS, **bad}))
        headers = {"Content-Type": "application/json"}
        reply = httpx.post(f"{controller.url}/register_worker", content=body, headers=headers, verify=TLS)
        assert reply.status_code in (400, 413)
        with decoy(status_reply(**{k: v for k, v in bad.items() if v == v and v != float("inf")})) as worker:
            post(controller.url, "/register_worker", registration(worker.url))
            assert post(controller.url, "/get_worker_address", {"model": MODEL}).json()["address"] == good.url


@pytest.mark.parametrize(
    "bad",
    [
        b"[]",
        b"{",
        b'"x"',
        b'{"text": 7}',
        b'{"error_code": []}',
        b'{"error_code": 1, "error": "x"}',
        b'{"error_code": 1e999}',
        b'{"text": "", "error_code": 0, "finish_reason": "stop", "usage": {"prompt_tokens": "x"}}',
        b'{"text": "", "error_code": 0, "finish_reason": ["stop"], "usage": [1]}',
        b"[" * 10_000,
    ],
    ids=lambda bad: bad[:60].decode(),
)
def test_check_05_bad_frames_are_one_error_of_the_api(bad: bytes) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    with live_controller() as controller, decoy(http_reply(bad + b"\0")) as worker:
        controller.registry.put(worker.url, True, status(), probed=True)
        assert post(controller.url, "/v1/chat/completions", chat).status_code == 502
        events = post(controller.url, "/v1/chat/completions", {**chat, "stream": True}).text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "worker_unavailable"
        assert events[-2:] == ["data: [DONE]", ""]


def status(model: str = MODEL, speed: float = 1, queue: float = 0) -> WorkerStatus:
    return WorkerStatus(model_names=[model], speed=speed, queue_length=queue)


def test_check_06_stale_workers_go_once_and_live_ones_stay() -> None:
    now = 0.0
    registry = Registry(expiration=30, clock=lambda: now)
    registry.put("http://stale", True, status(), probed=True)
    registry.put("http://live", True, status(), probed=True)
    registry.put("http://by-hand", False, status(), probed=True)
    now = 20.0
    assert registry.heart_beat("http://live", 0)
    now = 31.0
    assert registry.remove_expired() == ["http://stale"]
    assert registry.remove_expired() == []
    assert {entry.address for entry in registry.entries()} == {"http://live", "http://by-hand"}
    assert not registry.heart_beat("http://stale", 0), "an unknown worker must register"


def test_check_06_sweeping_and_registering_at_the_same_time_breaks_nothing() -> None:
    registry = Registry(expiration=-1)  # everything with heartbeats is late at once
    errors: list[BaseException] = []
    done = threading.Event()

    def churn(first: int) -> None:
        try:
            for k in range(first, first + 1000):
                registry.put(f"http://w{k}", True, status(), probed=True)
                registry.models()
                registry.pick(MODEL)
        except BaseException as error:
            errors.append(error)

    def sweep() -> None:
        try:
            while not done.is_set():
                registry.remove_expired()
        except BaseException as error:
            errors.append(error)

    sweeper = threading.Thread(target=sweep)
    writers = [threading.Thread(target=churn, args=(10_000 * k,)) for k in range(2)]
    for thread in [sweeper, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    sweeper.join()
    registry.remove_expired()
    assert errors == []
    assert len(registry) == 0


def test_check_06_the_sweep_outlives_a_failure_within() -> None:
    with live_controller(sweep=0.02, expiration=0.05) as controller:
        original, calls = controller.registry.remove_expired, []

        def failing() -> list[str]:
            calls.append(1)
            if len(calls) < 3:
                raise RuntimeError("dictionary changed size during iteration")
            return original()

        controller.registry.remove_expired = failing  # type: ignore[method-assign]
        controller.registry.put("http://127.0.0.1:9", True, status(), probed=True)
        until(lambda: len(controller.registry) == 0)
        assert len(calls) >= 3


def test_check_16_an_unknown_model_is_one_frame() -> None:
    with live_controller() as controller:
        frames = frames_of(generate(controller.url, request_body()))
    assert [frame["error_code"] for frame in frames] == [2]
    assert frames[0]["error"]["type"] == "model_not_found"


def test_check_16_a_worker_that_dies_in_the_middle_ends_in_one_error_frame() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    frame = b'{"text": "hello wor", "error_code": 0}\0'
    broken = head + f"{len(frame):x}\r\n".encode() + frame + b"\r\n"  # and no last chunk
    with live_controller() as controller, decoy(broken) as worker:
        controller.registry.put(worker.url, True, status(), probed=True)
        frames = frames_of(generate(controller.url, request_body()))
    assert [frame["error_code"] for frame in frames] == [0, 3]


def test_check_16_a_worker_that_is_gone_is_one_frame_and_another_takes_over() -> None:
    with live_controller() as controller:
        controller.registry.put("http://127.0.0.1:9", True, status(), probed=True)
        frames = frames_of(generate(controller.url, request_body()))
        assert [frame["error_code"] for frame in frames] == [3]
        with live_worker(StubEngine(), controller=controller.url):
            until(lambda: len(controller.registry) == 2)
            for _ in range(3):
                assert frames_of(generate(controller.url, request_body()))[-1]["finish_reason"] == "length"


def test_dispatch_alternates_between_equal_workers() -> None:
    registry = Registry()
    for name in ("http://a", "http://b"):
        registry.put(name, True, status(), probed=True)
    assert [registry.pick(MODEL) for _ in range(4)] == ["http://a", "http://b"] * 2
    registry.heart_beat("http://a", 5)
    assert registry.pick(MODEL) == "http://b"


def test_the_lottery_draws_by_speed() -> None:
    registry = Registry("lottery", rng=random.Random(0))
    registry.put("http://a", True, status(speed=1), probed=True)
    registry.put("http://b", True, status(speed=3), probed=True)
    registry.put("http://c", True, status(speed=0), probed=True)
    drawn = [registry.pick(MODEL) for _ in range(4000)]
    assert abs(drawn.count("http://a") / 4000 - 0.25) < 0.03
    assert "http://c" not in drawn


def test_a_worker_that_keeps_failing_is_asked_last() -> None:
    now = 0.0
    registry = Registry(clock=lambda: now)
    for name in ("http://a", "http://b"):
        registry.put(name, True, status(), probed=True)
    for _ in range(3):
        registry.report("http://a", ok=False)
    assert {registry.pick(MODEL) for _ in range(5)} == {"http://b"}
    now = 31.0
    assert "http://a" in {registry.pick(MODEL) for _ in range(9)}


def test_an_empty_controller_answers_as_published() -> None:
    with live_controller() as controller:
        assert post(controller.url, "/list_models").json() == {"models": []}
        assert post(controller.url, "/get_worker_address", {"model": "x"}).json() == {"address": ""}
        beat = {"worker_name": "http://127.0.0.1:9", "queue_length": 0}
        assert post(controller.url, "/receive_heart_beat", beat).json() == {"exist": False}
        assert post(controller.url, "/refresh_all_workers").json() is None
        assert get(controller.url, "/list_models").status_code == 405


def test_refreshing_drops_the_dead_and_keeps_the_busy() -> None:
    with live_controller(timeouts=Timeouts(status=3), sweep=600) as controller, decoy() as busy:
        controller.registry.put(busy.url, True, status("busy"), probed=True)
        controller.registry.put("http://127.0.0.1:9", False, status("dead"), probed=True)
        post(controller.url, "/refresh_all_workers")
        assert controller.registry.models() == ["busy"]


def test_a_controller_can_stand_behind_a_controller() -> None:
    with live_controller() as child, live_worker(controller=child.url), live_controller() as parent:
        until(lambda: child.registry.models() == [MODEL])
        body = {"worker_name": child.url, "check_heart_beat": False, "worker_status": None}
        assert post(parent.url, "/register_worker", body).json() == {"registered": True}
        assert frames_of(generate(parent.url, request_body()))[-1]["text"] == "hellow0 w1 w2 "
