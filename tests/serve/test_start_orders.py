"""Controller, worker and web page as programs, started in each of the six orders: the page lists the model at last.

Run by hand: `LLAVA_START_ORDERS=10 python -m pytest tests/serve/test_start_orders.py`; the number is how many seconds
there may be between the start of the last program and the model on the page.
"""

from __future__ import annotations

import itertools
import os
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from llava.serve.common.server import bind_socket, port_of
from llava.serve.serve_all import listed_models
from tests.serve.programs import START, program
from tests.serve.stubs import until

SECONDS = float(os.environ.get("LLAVA_START_ORDERS", "0"))
PARTS = ("controller", "model_worker", "gradio_web_server")


def free_ports(count: int) -> list[int]:
    sockets = [bind_socket("127.0.0.1", 0) for _ in range(count)]
    ports = [port_of(sock) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def serves(url: str, name: str) -> bool:
    """Whether a program is running; for a worker, whether its model is loaded."""
    reply = httpx.get(f"{url}/{'ready' if name == 'model_worker' else 'health'}", trust_env=False, timeout=30)
    return reply.status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(not SECONDS, reason="set LLAVA_START_ORDERS to a number of seconds, such as 10")
@pytest.mark.parametrize("order", list(itertools.permutations(PARTS)), ids=lambda order: ", ".join(order))
def test_the_model_is_listed_whatever_starts_last(
    order: tuple[str, ...], child_environment: dict[str, str], tiny_dirs: dict[str, Path]
) -> None:
    inner, page = free_ports(2)
    link = ["--controller", f"http://127.0.0.1:{inner}"]
    words = {
        "controller": ["--port", str(inner)],
        "model_worker": [*link, "--port", "0", "--device", "cpu", "--model-path", str(tiny_dirs["chat"])],
        "gradio_web_server": [*link, "--port", str(page), "--model-list-mode", "reload"],
    }
    environment = {**child_environment, "NO_PROXY": "*"}
    with ExitStack() as stack:
        for name in order:
            start = time.monotonic()
            running = stack.enter_context(program(environment, name, *words[name]))
            if name != order[-1]:
                until(lambda url=running.url, name=name: serves(url, name), START)
        address = f"http://127.0.0.1:{page}"
        until(lambda: listed_models(address), START)
        took = time.monotonic() - start
        assert listed_models(address) == [tiny_dirs["chat"].name]
        assert httpx.get(f"{address}/ready", trust_env=False).status_code == 200
    print(f"{took:.1f} s after {order[-1]} as the last of {', '.join(order)}")
    assert took < SECONDS
