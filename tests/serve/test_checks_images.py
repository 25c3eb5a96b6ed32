"""Serving checks 23–28 and 30: images of every kind, addresses, files, and weights of others."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from llava import download
from llava.engine import load_engine
from llava.errors import CheckpointError
from llava.images import preprocess_image
from llava.serve.control import openai_api
from tests.serve.stubs import (
    MODEL,
    PATIENCE,
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
from tests.tiny import make_lora, make_projector_only


@pytest.fixture(scope="module")
def worker() -> Iterator[LiveWorker]:
    with live_worker() as running:
        yield running


def grey_bomb(width: int, height: int) -> bytes:
    """A PNG of black gray-scale pixels, created without allocating them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (width + 1)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    """An animation of 1x1 images."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return head + frame * frames + b";"


def peak() -> int:
    """Peak memory of this process in bytes since `forget_peak`; 0 where the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


REFUSED = {
    "13000x13000 grey": lambda: grey_bomb(13_000, 13_000),
    "9000x9000 grey": lambda: grey_bomb(9_000, 9_000),  # below Pillow's own limit
    "20000x1": lambda: png(20_000, 1),
    "1x20000": lambda: png(1, 20_000),
    "9000x30": lambda: png(9_000, 30),
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
def test_check_23_images_that_cost_too_much_are_refused_by_their_header(worker: LiveWorker, name: str) -> None:
    text = b64(REFUSED[name]())
    forget_peak()
    before = peak()
    reply = generate(worker.url, request_body("<image>", images=[text]))
    grown = peak() - before
    assert reply.status_code == 400
    assert frames_of(reply)[0]["error"]["type"] == "bad_image"
    # Client, server and thread pool share this process, so the request's own bytes are in here several times.
    assert grown < 64 * 2**20 + 12 * len(text)
    until(lambda: worker.in_use == 0)


def test_check_23_an_animation_costs_its_first_frame(worker: LiveWorker) -> None:
    text = b64(gif(100_000))
    forget_peak()
    before = peak()
    assert generate(worker.url, request_body("<image>", 1, images=[text])).status_code == 200
    assert peak() - before < 64 * 2**20 + 12 * len(text)
    (given,) = worker.engine.history[-1].request.images
    assert isinstance(given, Image.Image) and (given.mode, given.size) == ("RGB", (1, 1))
    until(lambda: worker.in_use == 0)


@pytest.mark.parametrize("text", ["?", "====", "a", "é", "data:image/png;base64,AAAA", "\0"])
def test_check_23_what_is_not_base64_is_refused(worker: LiveWorker, text: str) -> None:
    reply = generate(worker.url, request_body("<image>", images=[text]))
    assert reply.status_code == 400
    assert frames_of(reply)[0]["error"]["type"] == "bad_image"


BASE = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
DEEP = (np.arange(100, dtype=np.uint16) * 600).reshape(10, 10)
SIDEWAYS = BASE[:4]  # 10 wide, 4 high


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_mode(mode: str) -> tuple[bytes, np.ndarray]:
    """An image file, and its pixels in RGB, computed independently."""
    base = Image.fromarray(BASE)
    grey = np.stack([np.asarray(base.convert("L"))] * 3, axis=-1)
    colors = np.asarray(base.convert("P").convert("RGB"))
    entries = np.asarray(base.convert("P"))

    def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        return np.rint(255 - (255.0 - pixels) * alpha[..., None] / 255).astype(np.uint8)

    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg = encoded(base.convert("CMYK"), "JPEG")
    files = {
        "RGB": (encoded(base), BASE),
        "CMYK": (jpeg, np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))),
        "L": (encoded(base.convert("L")), grey),
        "LA": (encoded(base.convert("LA")), grey),
        "P": (encoded(base.convert("P")), colors),
        "P+alpha": (encoded(base.convert("P"), transparency=bytes(range(256))), over_white(colors, entries)),
        "RGBA": (encoded(Image.fromarray(np.dstack([BASE, BASE[:, :, 0]]))), over_white(BASE, BASE[:, :, 0])),
        "GIF": (encoded(base.convert("P"), "GIF", save_all=True, append_images=[Image.new("P", (10, 10))]), colors),
        "1": (encoded(base.convert("1")), np.asarray(base.convert("1").convert("RGB"))),
        "I;16": (encoded(Image.fromarray(DEEP)), np.stack([DEEP // 256] * 3, axis=-1)),
        "EXIF": (encoded(Image.fromarray(SIDEWAYS), exif=turned), np.rot90(SIDEWAYS, -1)),
        "1x1": (encoded(Image.fromarray(BASE[:1, :1])), BASE[:1, :1]),
        "1 high": (encoded(Image.fromarray(BASE[:1])), BASE[:1]),
        "3 high": (encoded(Image.fromarray(BASE[:3])), BASE[:3]),
    }
    return files[mode]


MODES = ("RGB", "CMYK", "L", "LA", "P", "P+alpha", "RGBA", "GIF", "1", "I;16", "EXIF", "1x1", "1 high", "3 high")


@pytest.mark.parametrize("mode", MODES)
def test_check_24_every_mode_of_image_arrives_upright_in_rgb(worker: LiveWorker, mode: str) -> None:
    data, expected = in_mode(mode)
    assert generate(worker.url, request_body("<image>", 1, images=[b64(data)])).status_code == 200
    (given,) = worker.engine.history[-1].request.images
    assert isinstance(given, Image.Image)
    assert given.mode == "RGB"
    assert np.abs(np.asarray(given, int) - expected).max() <= int("alpha" in mode or mode == "RGBA")  # rounding
    processor = CLIPImageProcessor(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14})
    pixels = preprocess_image(given, processor, None)
    assert pixels.shape == (3, 14, 14)
    if mode == "RGB":
        assert torch.equal(pixels, processor.preprocess(Image.fromarray(BASE), return_tensors="pt")["pixel_values"][0])


def ask(controller: LiveController, address: str) -> int:
    part = {"type": "image_url", "image_url": {"url": address}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    return post(controller.url, "/v1/chat/completions", body).status_code


@pytest.mark.parametrize("allowed", [False, True], ids=["by default", "when allowed"])
def test_check_25_addresses_are_fetched_only_when_allowed(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    fetched = []
    monkeypatch.setattr(openai_api, "download", lambda address, *_, **__: fetched.append(address) or png())
    with live_controller(allow_urls=allowed) as controller, live_worker(controller=controller.url) as served:
        until(lambda: controller.registry.models() == [MODEL])
        for address in ("http://pictures.example/a.png", "https://pictures.example/a.png"):
            assert ask(controller, address) == (200 if allowed else 400), address
        assert len(fetched) == len(served.engine.history) == (2 if allowed else 0)
        assert ask(controller, "data:image/png;base64," + b64(png())) == 200
        assert ask(controller, "data:image/gif;base64," + b64(gif(3))) == 200


@pytest.mark.parametrize("allow_urls", [False, True], ids=["data only", "urls allowed"])
def test_check_28_paths_are_not_opened(tmp_path: Path, allow_urls: bool) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images_evil").mkdir()
    secret = tmp_path / "images_evil" / "a.png"
    secret.write_bytes(png())
    (tmp_path / "images" / "link.png").symlink_to(secret)
    with live_controller(allow_urls=allow_urls) as controller, live_worker(controller=controller.url) as served:
        until(lambda: controller.registry.models() == [MODEL])
        paths = ["file:///etc/passwd", "/etc/passwd.png", f"file://{secret}", f"file://localhost{secret}", str(secret)]
        paths += [f"{tmp_path}/images/../images_evil/a.png", f"{tmp_path}/images/link.png", f"FILE:{secret}"]
        for address in (*paths, "data:text/plain;base64,aGk=", "data:image/png,raw", "ftp://example.org/a.png", ""):
            assert ask(controller, address) == 400, address
        for path in paths:
            for url in (served.url, controller.url):
                reply = generate(url, request_body("<image>", images=[path]))
                assert (reply.status_code, frames_of(reply)[0]["error"]["type"]) == (400, "bad_image"), path
        assert served.engine.history == []


HOSTS = ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "10.0.0.1", "100.64.0.1", "0.0.0.0"]
HOSTS += ["2130706433", "0x7f.1", "localhost.", "localhost", "192.168.0.1", "[64:ff9b::7f00:1]"]


@pytest.fixture(scope="module")
def fetching() -> Iterator[tuple[LiveController, LiveWorker]]:
    """A controller that fetches addresses, and its worker."""
    with live_controller(allow_urls=True) as controller, live_worker(controller=controller.url) as served:
        until(lambda: controller.registry.models() == [MODEL])
        yield controller, served


def test_check_25_only_public_hosts_when_fetching_is_on(
    monkeypatch: pytest.MonkeyPatch, fetching: tuple[LiveController, LiveWorker]
) -> None:
    controller, _ = fetching
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with decoy() as target:
        for host in HOSTS:
            for scheme in ("https", "http"):
                assert ask(controller, f"{scheme}://{host}:{target.port}/a.png") == 400, host
        for address in (
            f"https://example.org@127.0.0.1:{target.port}/",
            f"https://127.0.0.1:{target.port}\\@example.org/",
        ):
            assert ask(controller, address) == 400
        assert target.hits == 0


PUBLIC = ("93.184.216.34", 443)


class Network:
    """Patched network: name lookups return the given lists of addresses in turn, connections are recorded.

    What is dialled is answered by `reply`, without TLS; the test's own calls to `spared` ports go through.
    """

    def __init__(self, patch: pytest.MonkeyPatch, answers: list[list[str]], reply: bytes, spared: set[int]) -> None:
        self.answers, self.reply, self.spared = answers, reply, spared
        self.asked: list[str] = []
        self.dialled: list[tuple[str, int]] = []
        self.open: list[socket.socket] = []
        self._resolve, self._connect = socket.getaddrinfo, socket.create_connection
        patch.setattr(socket, "getaddrinfo", self.resolve)
        patch.setattr(socket, "create_connection", self.connect)
        patch.setattr(download.ssl, "create_default_context", lambda: self)

    def resolve(self, host: str, port: int, *args: object, **options: object) -> list[object]:
        if port in self.spared:
            return self._resolve(host, port, *args, **options)  # type: ignore[arg-type, return-value]
        self.asked.append(host)
        found = self.answers.pop(0) if self.answers else ["127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    def connect(self, address: tuple[str, int], *args: object, **options: object) -> socket.socket:
        if address[1] in self.spared:
            return self._connect(address, *args, **options)  # type: ignore[arg-type]
        self.dialled.append(address)
        ours, theirs = socket.socketpair()
        theirs.sendall(self.reply)
        theirs.shutdown(socket.SHUT_WR)
        self.open.append(theirs)
        return ours

    def wrap_socket(self, plain: socket.socket, **_: object) -> socket.socket:
        return plain


PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
REDIRECT = http_reply(b"", "Location: https://inner.example/latest/meta-data", status="302 Found")


@pytest.mark.parametrize(
    ("scheme", "answers", "reply", "dialled", "asked"),
    [
        ("http", [["93.184.216.34"]], http_reply(png()), [], 0),
        ("https", [["93.184.216.34"], ["127.0.0.1"]], http_reply(png()), [PUBLIC], 1),
        ("https", [["93.184.216.34", "127.0.0.1"]], http_reply(png()), [], 1),
        ("https", [["10.0.0.1"]], http_reply(png()), [], 1),
        ("https", [["93.184.216.34"], ["169.254.169.254"]], REDIRECT, [PUBLIC], 2),
        ("https", [["93.184.216.34"], ["93.184.216.34"]], REDIRECT, [PUBLIC] * 2, 3),
    ],
    ids=["not https", "rebinding", "mixed records", "private", "redirect to private", "redirect, then rebinding"],
)
def test_check_26_the_address_that_was_checked_is_the_one_that_is_dialled(
    monkeypatch: pytest.MonkeyPatch,
    fetching: tuple[LiveController, LiveWorker],
    scheme: str,
    answers: list[list[str]],
    reply: bytes,
    dialled: list[object],
    asked: int,
) -> None:
    controller, served = fetching
    before = len(served.engine.history)
    with decoy() as proxy:
        for name in PROXIES:
            monkeypatch.setenv(name, proxy.url)
        with monkeypatch.context() as patch:
            network = Network(patch, list(answers), reply, {controller.live.port, served.live.port})
            status = ask(controller, f"{scheme}://pictures.example/a.png")
        for end in network.open:
            end.close()
        answered = len(served.engine.history) - before
        assert (status, answered) == ((200, 1) if dialled == [PUBLIC] and asked == 1 else (400, 0))
        assert network.dialled == dialled
        assert len(network.asked) == asked, "a name is resolved once for each request"
        assert proxy.hits == 0


def test_check_27_a_fetch_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of redirects, bytes and seconds, with loopback allowed for the test."""
    with (
        live_controller(allow_urls=True, unsafe_local=True) as controller,
        live_worker(controller=controller.url) as served,
    ):
        until(lambda: controller.registry.models() == [MODEL])
        with decoy(http_reply(png())) as good:
            assert ask(controller, f"{good.url}/a.png") == 200
        with decoy() as loop:
            loop.reply = http_reply(b"", f"Location: {loop.url}/again", status="302 Found")
            assert ask(controller, loop.url) == 400
            assert loop.hits == 4
        away = http_reply(b"", "Location: http://169.254.169.254/latest", status="302 Found")
        broken = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + png()
        bomb = http_reply(zlib.compress(bytes(200 * 2**20), 1), "Content-Encoding: gzip")
        unsized = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
        for reply in (away, broken, bomb, unsized + bytes(20 * 2**20 + 1), http_reply(b"no", status="500 Oops")):
            with decoy(reply) as bad:
                forget_peak()
                before = peak()
                assert ask(controller, f"{bad.url}/a.png") == 400
                assert bad.hits == 1
                assert peak() - before < 128 * 2**20
        monkeypatch.setattr(openai_api, "download", functools.partial(download.download, timeout=0.5))
        for drip in (unsized, b"HTTP/1.1 200 OK\r\n"):  # in the body, and before it
            with decoy(drip) as slow:
                slow.drip = b"X: y\r\n"
                start = time.monotonic()
                assert ask(controller, f"{slow.url}/a.png") == 400
                assert time.monotonic() - start < PATIENCE / 2
        assert len(served.engine.history) == 1


class Mark:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin"]
)
def test_check_30_weights_are_data(tiny_dirs: dict[str, Path], tmp_path: Path, name: str) -> None:
    chat, mark, base = tmp_path / "chat", tmp_path / "executed", None
    if name == "pytorch_model.bin":
        shutil.copytree(tiny_dirs["chat"], chat)
    elif name == "mm_projector.bin":
        base = tiny_dirs["base"]
        make_projector_only(chat, tiny_dirs["chat"])
    else:
        make_lora(chat, tiny_dirs["chat"], tiny_dirs["base"])
    if not (chat / name).is_file():
        safe = chat / name.replace("pytorch_", "").replace(".bin", ".safetensors")
        torch.save(load_file(safe), chat / name)
        safe.unlink()
    names = list(torch.load(chat / name, weights_only=True))
    torch.save({**dict.fromkeys(names, torch.zeros(1)), names[0]: Mark(mark)}, chat / name)
    with pytest.raises(CheckpointError, match=r"would run code\) and is refused"):
        load_engine(chat, base, device="cpu")
    assert not mark.exists()


def test_check_30_the_state_of_an_optimizer_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint to resume from may be untrusted, too."""
    from llava.train.llava_trainer import LLaVATrainer

    mark = tmp_path / "executed"
    torch.save({"state": Mark(mark)}, tmp_path / "optimizer.pt")
    torch.save({}, tmp_path / "scheduler.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what torch before 2.6 does by default
    args, accelerator = SimpleNamespace(device=torch.device("cpu"), world_size=1), SimpleNamespace(scaler=None)
    trainer = SimpleNamespace(
        is_deepspeed_enabled=False, optimizer=None, lr_scheduler=None, args=args, accelerator=accelerator
    )
    with pytest.raises(CheckpointError, match=r"optimizer\.pt .* would run code"):
        LLaVATrainer._load_optimizer_and_scheduler(trainer, str(tmp_path))  # type: ignore[arg-type]
    assert not mark.exists()


def test_the_stub_sees_what_is_sent() -> None:
    engine = StubEngine()
    with live_worker(engine) as served:
        body = request_body("<image> <image>", 1, images=[b64(png()), b64(png(3, 5))], temperature=0.0005, seed=7)
        assert generate(served.url, {**body, "stop": ["a", ""]}).status_code == 200
    (job,) = engine.history
    assert [image.size for image in job.request.images] == [(20, 20), (3, 5)]  # type: ignore[union-attr]
    assert (job.request.params.temperature, job.request.params.seed, job.request.params.stop) == (0.0, 7, ("a",))
