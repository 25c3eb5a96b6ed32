"""Tokens, the bind rule, and rate limits."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest

from llava.errors import ConfigError
from llava.serve.common.security import (
    AddressRule,
    ApiKeys,
    RateLimiter,
    bearer,
    bind_host,
    cluster_token,
    is_loopback,
    read_secrets,
)
from tests.serve.stubs import get, live_controller, post


def test_keys_are_compared_whatever_they_hold() -> None:
    ring = ApiKeys(["one", "clé"])
    assert ring.accepts(b"one")
    assert ring.accepts("clé".encode())
    assert not any(ring.accepts(secret) for secret in (b"", b"ONE", b"one ", b"\xff", b"cl\xe9"))
    assert not ApiKeys()


@pytest.mark.parametrize(
    ("header", "credential"), [(b"Bearer x", b"x"), (b"bearer  x ", b"x"), (b"Basic x", b""), (b"", b""), (b"x", b"")]
)
def test_only_bearer_credentials_count(header: bytes, credential: bytes) -> None:
    assert bearer(header) == credential


def test_secrets_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\nsecond\n", encoding="utf-8")
    monkeypatch.setenv("KEYS", "a, b,,")
    assert read_secrets(file, "KEYS") == ["first", "second"]
    assert read_secrets(None, "KEYS") == ["a", "b"]
    assert cluster_token(file) == "first"
    monkeypatch.delenv("LLAVA_TOKEN", raising=False)
    assert cluster_token() is None
    file.write_text("# none\n", encoding="utf-8")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(ConfigError):
            read_secrets(path, "KEYS")


@pytest.mark.parametrize(
    ("host", "expected"), [("localhost", True), ("127.8.9.1", True), ("::1", True), ("0.0.0.0", False), ("host", False)]
)
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_without_a_token_we_listen_here_only(caplog: pytest.LogCaptureFixture) -> None:
    assert bind_host("localhost", protected=False, insecure=False) == "localhost"
    assert caplog.records == []
    assert bind_host("0.0.0.0", protected=False, insecure=False) == "127.0.0.1"
    assert "other machines cannot connect" in caplog.text
    caplog.clear()
    assert bind_host("0.0.0.0", protected=False, insecure=True) == "0.0.0.0"
    assert caplog.records[0].levelno == logging.WARNING
    assert bind_host("0.0.0.0", protected=True, insecure=False) == "0.0.0.0"
    with pytest.raises(ConfigError, match="--insecure"):
        bind_host("192.0.2.1", protected=False, insecure=False)


def test_addresses_by_pattern_and_network() -> None:
    rule = AddressRule(["10.0.0.0/8", "*.gpu.local"])
    for address in ("http://10.1.2.3:40000", "https://a.gpu.local", "http://[::ffff:10.0.0.1]:1"):
        assert rule.check(address) == address


def test_a_rate_is_an_average_with_a_burst() -> None:
    now = 0.0
    limiter = RateLimiter(60, clock=lambda: now, remember=3)
    assert [limiter.spend(b"a") for _ in range(60)] == [0.0] * 60
    assert limiter.spend(b"a") == pytest.approx(1.0)
    assert limiter.spend(b"b") == 0
    now = 1.0
    assert limiter.spend(b"a") == 0
    assert limiter.spend(b"a") > 0
    for client in (b"c", b"d", b"e"):
        limiter.spend(client)
    assert len(limiter._buckets) == 3


def test_a_request_counts_as_many_as_its_answers() -> None:
    body = {"model": "none", "prompt": ["x", "y"], "n": 2}
    with live_controller(rate_limit=3) as controller:
        replies = [post(controller.url, "/v1/completions", body) for _ in range(2)]
        assert [reply.status_code for reply in replies] == [404, 429]  # four answers, and one wait for two
        assert 30 <= int(replies[1].headers["Retry-After"]) <= 40
    chat = {"model": "none", "messages": [{"role": "user", "content": "x"}], "n": 2}
    with live_controller(rate_limit=3) as controller:
        statuses = [post(controller.url, "/v1/chat/completions", chat).status_code for _ in range(3)]
    assert statuses == [404, 404, 429]


def test_the_api_refuses_a_key_that_asks_too_often() -> None:
    body = {"model": "none", "messages": [{"role": "user", "content": "x"}]}
    with live_controller(api_keys=["k", "l"], rate_limit=2) as controller:
        with httpx.Client(base_url=controller.url, trust_env=False, timeout=60) as client:
            replies = [
                client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
                for key in ("k", "k", "k", "l")
            ]
        assert [reply.status_code for reply in replies] == [404, 404, 429, 404]
        assert int(replies[2].headers["Retry-After"]) >= 1
        assert replies[2].json()["error"]["error_type"] == "rate_limited"
        assert replies[2].json()["error"]["code"] == "rate_limit_exceeded"
        assert get(controller.url, "/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200
