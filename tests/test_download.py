"""Downloads: addresses of the local network are rejected in every notation, and limits hold."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llava.download import download
from llava.errors import ImageError


def resolver(table: dict[str, list[str]]) -> Callable[..., list[Any]]:
    def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        if host not in table:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in table[host]]

    return getaddrinfo


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.5.4",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "ff02::1",
    ],
)
def test_private_addresses_are_rejected_before_connecting(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(socket, "create_connection", connect)
    # A single private address suffices.
    for answers in ([address], ["93.184.216.34", address]):
        monkeypatch.setattr(socket, "getaddrinfo", resolver({"evil.example": answers}))
        with pytest.raises(ImageError, match=r"^[^:]*https:[^:]*: evil\.example is not a public address"):
            download("https://evil.example/a.png", 100)


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1/", "https://localhost/", "https://2130706433/", "https://[::1]/", "https://0/"]
)
def test_literal_loopback_addresses_are_rejected(url: str) -> None:
    with pytest.raises(ImageError, match="is not a public address|Cannot fetch"):
        download(url, 100)


def test_the_connection_uses_the_checked_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding fails, because the name is resolved once."""
    asked: list[str] = []
    connected: list[Any] = []

    def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        asked.append(host)
        address = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(address: Any, *args: Any, **kwargs: Any) -> None:
        connected.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ImageError, match="refused"):
        download("https://user@rebind.example:8443/a.png", 100)
    assert (asked, connected) == (["rebind.example"], [("93.184.216.34", 8443)])


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "https:///a.png",
        "https://x:99999/",
        "https://[::1/",
        "https://a b/",
        "https://\udc80/",
        "https://" + "a" * 300 + "/",
    ],
)
def test_malformed_urls(url: str) -> None:
    with pytest.raises(ImageError, match="Cannot fetch"):
        download(url, 100)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path.split("?")[0]:
            case "/ok":
                self.reply(200, b"hello")
            case "/hop":
                self.reply(302, b"", Location="/ok")
            case "/loop":
                self.reply(302, b"", Location="/loop")
            case "/private":
                self.reply(302, b"", Location="http://169.254.169.254/latest/meta-data")
            case "/file":
                self.reply(302, b"", Location="file:///etc/passwd")
            case "/short":
                self.reply(200, b"hello", length=50)
            case "/endless":
                self.send_response(200)
                self.end_headers()
                self.feed(b"x" * 4096, 0.0)
            case "/slow":
                self.send_response(200)
                self.end_headers()
                self.feed(b"x", 0.05)
            case "/slow-headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                self.feed(b"X-A: 1\r\n", 0.05)
            case _:
                self.reply(404, b"no")

    def reply(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def feed(self, data: bytes, pause: float) -> None:
        end = time.monotonic() + 5
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                self.wfile.write(data)
                time.sleep(pause)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_local_bodies_and_redirects(server: str) -> None:
    assert download(f"{server}/ok?a=b", 5, unsafe_local=True) == b"hello"
    assert download(f"{server}/hop", 5, unsafe_local=True) == b"hello"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/ok", "more than 4 bytes"),
        ("/endless", "more than 4 bytes"),
        ("/loop", "more than 3 redirects"),
        ("/private", "169.254.169.254 is not a public address"),
        ("/file", "its scheme must be https"),
        ("/missing", "status 404"),
    ],
)
def test_rejected_responses(server: str, path: str, why: str) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match=why):
        download(server + path, 4, unsafe_local=True)
    assert time.monotonic() - start < 3  # does not wait for the endless body


def test_an_incomplete_body_is_an_error(server: str) -> None:
    with pytest.raises(ImageError, match="Cannot fetch"):
        download(f"{server}/short", 100, unsafe_local=True)


@pytest.mark.parametrize("path", ["/slow", "/slow-headers"])
def test_the_timeout_bounds_the_whole_transfer(server: str, path: str) -> None:
    """Each byte arrives in time, the whole body does not."""
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"longer than 0\.4 seconds"):
        download(server + path, 10**6, timeout=0.4, unsafe_local=True)
    assert time.monotonic() - start < 3


def test_loopback_needs_unsafe_local(server: str) -> None:
    with pytest.raises(ImageError, match="its scheme must be https"):
        download(f"{server}/ok", 100)
    with pytest.raises(ImageError, match="not a public address"):
        download(f"{server}/ok".replace("http:", "https:"), 100)


def test_an_error_after_the_deadline_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*args: Any) -> None:
        raise OSError("cut")

    monkeypatch.setattr("llava.download._get", late)
    with pytest.raises(ImageError, match="longer than 0 seconds"):
        download("https://example.com/a.png", 9, timeout=0)
    with pytest.raises(ImageError, match="cut"):
        download("https://example.com/a.png", 9)
