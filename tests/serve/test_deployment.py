"""The page on deployment is true: its curl lines and its three commands run as written, on ports of the test's own."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from llava.serve import controller, gradio_web_server, model_worker, openai_worker, register_worker
from llava.serve.common.security import bind_host
from tests.serve.stubs import MODEL, live_controller, live_worker, until

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "Deployment.md").read_text(encoding="utf-8")
CURL = re.findall(r"^curl .*", PAGE, re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_curl_lines_of_the_page_work() -> None:
    assert len(CURL) >= 4
    with live_controller() as running, live_worker(controller=running.url):
        until(lambda: running.registry.models() == [MODEL])
        for line in CURL:
            words = shlex.split(line.replace("http://localhost:10000", running.url))
            words = [word.replace("InternVL-Chat-ViT-6B-Vicuna-7B", MODEL) for word in words]
            done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
            if "-sN" in words:
                assert done.stdout.endswith("data: [DONE]\n\n")
            elif "completions" in line:
                assert json.loads(done.stdout)["choices"][0]["message"]["content"].startswith("w0")
            else:
                assert MODEL in done.stdout or json.loads(done.stdout)["ready"] is True


@pytest.mark.parametrize(
    ("module", "name"),
    [(controller, "controller"), (openai_worker, "openai_worker"), (register_worker, "register_worker")],
)
def test_every_command_of_the_page_parses(module: object, name: str) -> None:
    found = re.findall(rf"^\s*python -m llava\.serve\.{name} (.*)", PAGE, re.MULTILINE)
    assert found
    for words in found:
        assert module.build_parser().parse_args(shlex.split(words))  # type: ignore[attr-defined]


def test_the_parts_of_the_compose_file_can_be_reached_by_each_other() -> None:
    parts = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name, module in (("controller", controller), ("worker", model_worker), ("web", gradio_web_server)):
        program, *words = parts[name]["command"]
        args = module.build_parser().parse_args(words)
        protected = name != "web"  # LLAVA_TOKEN must be set; logins need not
        assert program == module.__name__
        assert bind_host(args.host, protected=protected, insecure=args.insecure) == "0.0.0.0"
        assert str(args.port) == parts[name]["environment"].get("PORT", "10000")
        assert all(port.startswith("127.0.0.1:") for port in parts[name].get("ports", []))


def test_worker_commands_and_their_short_flags_parse() -> None:
    parser = model_worker.build_parser()
    for words in re.findall(r"python -m llava\.serve\.model_worker (.*)", PAGE):
        args = parser.parse_args(shlex.split(words))
        assert args.controller_address == "http://localhost:10000"
        assert args.limit_model_concurrency == 5
    words = "--worker http://localhost:1 --model-path x --load-4bit --model-base y --device cpu --no-register"
    args = parser.parse_args(shlex.split(words))
    assert (args.worker_address, args.load_4bit, args.no_register) == ("http://localhost:1", True, True)
