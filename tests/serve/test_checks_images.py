"""Serving checks 23–28 and 30 (anchors.md §3.4): pictures of every kind, addresses, files, and weights of others."""

from __future__ import annotations

import io
import pickle
import resource
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.data import download
from llava.data.images import open_image
from llava.engine import load_engine
from llava.errors import CheckpointError
from tests.serve.stubs import (
    MODEL,
    LiveController,
    LiveWorker,
    StubEngine,
    b64,
    decoy,
    frames_of,
    generate,
    http_reply,
    live_controller,
    live_worker,
    png,
    post,
    request_body,
    until,
)


@pytest.fixture(scope="module")
def worker() -> Iterator[LiveWorker]:
    with live_worker() as running:
        yield running


def grey_bomb(width: int, height: int) -> bytes:
    """A PNG of that many grey pixels, all black, made without ever holding them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (width + 1)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("P", (2, 2), k % 2) for k in range(frames)]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


REFUSED = {
    "13000x13000 grey": lambda: grey_bomb(13_000, 13_000),
    "20000x1": lambda: png(20_000, 1),
    "1x20000": lambda: png(1, 20_000),
    "9000x30": lambda: png(9_000, 30),
    "gif of 300 frames": lambda: gif(300),
    "truncated": lambda: png(200, 200)[:80],
    "empty": lambda: b"",
    "polyglot": lambda: b"%PDF-1.4\n" + png(),
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "tiff": lambda: png(kind="TIFF"),
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "bmp": lambda: png(kind="BMP"),
    "21 MB": lambda: png() + bytes(21 * 2**20),
}


@pytest.mark.parametrize("name", REFUSED)
def test_check_23_pictures_that_cost_too_much_are_refused_by_their_header(worker: LiveWorker, name: str) -> None:
    text = b64(REFUSED[name]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reply = generate(worker.url, request_body("<image>", images=[text]))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert reply.status_code == 400
    assert frames_of(reply)[0]["error"]["type"] == "bad_image"
    # Client, server and thread pool share this process, so the request's own bytes are in here several times.
    assert grown < 64 * 1024 + 12 * len(text) / 1024
    until(lambda: worker.in_use == 0)


@pytest.mark.parametrize("text", ["?", "====", "a", "é", "data:image/png;base64,AAAA", "\0"])
def test_check_23_what_is_not_base64_is_refused(worker: LiveWorker, text: str) -> None:
    reply = generate(worker.url, request_body("<image>", images=[text]))
    assert reply.status_code == 400
    assert frames_of(reply)[0]["error"]["type"] == "bad_image"


def in_mode(mode: str) -> bytes:
    base = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    kind = "JPEG" if mode == "CMYK" else "PNG"
    buffer = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10) * 600).save(buffer, kind)
    elif mode == "P+alpha":
        base.convert("P").save(buffer, kind, transparency=bytes(range(256)))
    elif mode == "1x1":
        base.resize((1, 1)).save(buffer, kind)
    elif mode == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (10, 4)).save(buffer, "JPEG", exif=exif)
    else:
        base.convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L", "LA", "P", "P+alpha", "RGBA", "1", "I;16", "EXIF", "1x1"])
def test_check_24_every_mode_of_picture_arrives_as_the_opener_gives_it(worker: LiveWorker, mode: str) -> None:
    data = in_mode(mode)
    assert generate(worker.url, request_body("<image>", 1, images=[b64(data)])).status_code == 200
    (given,) = worker.engine.history[-1].request.images
    assert isinstance(given, Image.Image)
    assert given.mode == "RGB"
    assert given.tobytes() == open_image(data).tobytes()
    if mode == "EXIF":
        assert given.size == (4, 10)


def ask(controller: LiveController, address: str) -> int:
    part = {"type": "image_url", "image_url": {"url": address}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    return post(controller.url, "/v1/chat/completions", body).status_code


def test_check_25_and_28_addresses_are_not_fetched_and_paths_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures_evil").mkdir()
    secret = tmp_path / "pictures_evil" / "a.png"
    secret.write_bytes(png())
    (tmp_path / "pictures" / "link.png").symlink_to(secret)
    with live_controller() as controller, live_worker(controller=controller.url) as served, decoy() as target:
        until(lambda: controller.registry.models() == [MODEL])
        for address in (
            f"http://127.0.0.1:{target.port}/a.png",
            f"https://localhost:{target.port}/a.png",
            f"file://{secret}",
            "file:///etc/passwd",
            str(secret),
            f"{tmp_path}/pictures/../pictures_evil/a.png",
            f"{tmp_path}/pictures/link.png",
            "/etc/passwd.png",
            "data:text/plain;base64,aGk=",
            "data:image/png,raw",
            "ftp://example.org/a.png",
            "",
        ):
            assert ask(controller, address) == 400, address
        assert target.hits == 0
        assert served.engine.history == []
        assert ask(controller, "data:image/png;base64," + b64(png())) == 200


HOSTS = ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "10.0.0.1", "100.64.0.1", "0.0.0.0"]
HOSTS += ["2130706433", "0x7f.1", "localhost.", "localhost", "192.168.0.1", "[64:ff9b::7f00:1]"]


def test_check_25_only_public_hosts_when_fetching_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with (
        live_controller(allow_urls=True) as controller,
        live_worker(controller=controller.url),
        decoy() as target,
    ):
        until(lambda: controller.registry.models() == [MODEL])
        for host in HOSTS:
            for scheme in ("https", "http"):
                assert ask(controller, f"{scheme}://{host}:{target.port}/a.png") == 400, host
        for address in (
            f"https://example.org@127.0.0.1:{target.port}/",
            f"https://127.0.0.1:{target.port}\\@example.org/",
        ):
            assert ask(controller, address) == 400
        assert target.hits == 0


def test_check_25_mixed_answers_of_the_name_server_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(2, 1, 6, "", ("93.184.216.34", 443)), (2, 1, 6, "", ("127.0.0.1", 443))]

    asked = []

    def rebinding(*_: object, **__: object) -> list[tuple[object, ...]]:
        asked.append(1)
        return [(2, 1, 6, "", ("127.0.0.1" if len(asked) > 1 else "10.0.0.1", 443))]

    with live_controller(allow_urls=True) as controller, live_worker(controller=controller.url):
        until(lambda: controller.registry.models() == [MODEL])
        for resolver in (mixed, rebinding):
            with monkeypatch.context() as patch:
                patch.setattr(download.socket, "getaddrinfo", local_first(resolver))
                assert ask(controller, "https://pictures.example/a.png") == 400
    assert len(asked) == 1, "a name is resolved once"


def local_first(resolver: object) -> object:
    """The real resolver for loopback, which the servers of this test need."""
    import socket

    real = socket.getaddrinfo

    def resolve(host: object, *args: object, **options: object) -> object:
        if host in ("127.0.0.1", b"127.0.0.1"):
            return real(host, *args, **options)  # type: ignore[arg-type]
        return resolver(host, *args, **options)  # type: ignore[operator]

    return resolve


def test_check_26_and_27_what_a_picture_server_may_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the test's leave to call loopback: redirects are counted and checked, bytes and time are limited."""
    monkeypatch.setattr(download, "_MAX_REDIRECTS", 3)
    with (
        live_controller(allow_urls=True, unsafe_local=True) as controller,
        live_worker(controller=controller.url) as served,
    ):
        until(lambda: controller.registry.models() == [MODEL])
        with decoy(http_reply(png())) as good:
            assert ask(controller, f"{good.url}/a.png") == 200
        away = http_reply(b"", "Location: http://169.254.169.254/latest", status="302 Found")
        broken = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + png()
        gzipped = http_reply(zlib.compress(bytes(10_000)), "Content-Encoding: gzip")
        big = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(20 * 2**20 + 1)
        for reply in (away, broken, gzipped, big, http_reply(b"no", status="500 Oops")):
            with decoy(reply) as bad:
                assert ask(controller, f"{bad.url}/a.png") == 400
                assert bad.hits == 1
        with decoy() as loop:
            loop.reply = http_reply(b"", f"Location: {loop.url}/again", status="302 Found")
            assert ask(controller, loop.url) == 400
            assert loop.hits == 4
        assert len(served.engine.history) == 1


class Mark:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["mm_projector.bin", "pytorch_model.bin", "non_lora_trainables.bin"])
def test_check_30_weights_are_data(tiny_dirs: dict[str, Path], tmp_path: Path, name: str) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(tiny_dirs["chat"], chat)
    mark = tmp_path / "executed"
    (chat / "model.safetensors").unlink()
    (chat / name).write_bytes(pickle.dumps({"model.mm_projector.0.weight": Mark(mark)}, protocol=2))
    base = tiny_dirs["base"] if name != "pytorch_model.bin" else None
    with pytest.raises(CheckpointError):
        load_engine(chat, base, device="cpu")
    assert not mark.exists()
    assert threading.active_count() >= 1


def test_the_stub_sees_what_is_sent() -> None:
    engine = StubEngine()
    with live_worker(engine) as served:
        body = request_body("<image> <image>", 1, images=[b64(png()), b64(png(3, 5))], temperature=0.0005, seed=7)
        assert generate(served.url, {**body, "stop": ["a", ""]}).status_code == 200
    (job,) = engine.history
    assert [image.size for image in job.request.images] == [(20, 20), (3, 5)]  # type: ignore[union-attr]
    assert (job.request.params.temperature, job.request.params.seed, job.request.params.stop) == (0.0, 7, ("a",))
