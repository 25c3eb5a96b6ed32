"""Comparisons with live peers: turns, reports and failures, with stubs in the place of peers."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.floor import Ceilings
from benchmarks.peers import __main__ as peers
from benchmarks.peers import generate, process, serve, train
from benchmarks.peers.process import PeerError, Process
from llava.train.flops import Shape
from tests.serve.stubs import StubEngine, live_controller, live_worker, until
from tests.tiny import CHAT, make_base

PYTHON = sys.executable  # tests replace it

STUB_PEER = """\
import json, sys
given = json.loads(sys.argv[-1])
assert set(given) == {"model", "batch", "bf16"}
def say(**reply):
    print(json.dumps(reply), flush=True)
say(version="stub 5", learning=LEARNING, threads=1)
for turn, _ in enumerate(sys.stdin):
    if turn == FAILS:
        sys.exit("the stub ran out of luck")
    say(seconds=[9.0, 2.0, 4.0, 8.0][turn], loss=LOSS, peak_mib=1000.0, beyond_mib=500.0)
"""


def stub(path: Path, learning: int = 10, fails: int = -1, loss: float = 2.0, speed: float = 1.0) -> list[str]:
    """The command of a program that replies as a peer does; `speed` divides its times."""
    text = STUB_PEER.replace("LEARNING", str(learning)).replace("FAILS", str(fails)).replace("LOSS", str(loss))
    path.write_text(text.replace("[turn]", f"[turn] / {speed}"), encoding="utf-8")
    return [sys.executable, str(path), json.dumps({"model": "", "batch": "", "bf16": False})]


def test_a_peer_takes_turns_and_is_compared_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, peer = stub(tmp_path / "ours.py", speed=4.0), stub(tmp_path / "peer.py")
    ready, replies = train.take_turns(ours, peer, pairs=3)
    assert ready["version"] == "stub 5"
    assert [[reply["seconds"] for reply in side] for side in replies] == [[2.25, 0.5, 1, 2], [9, 2, 4, 8]]
    assert not train.report("images", "float32", replies)  # the same memory
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| images, time | 4.000 s | 1.000 s | 0.25 (0.25-0.25) | <= 0.7 |"
    assert lines[1].endswith("| 1.00 | <= 0.6 |") and "differs by 0.0e+00" in lines[3]
    for reply in replies[0]:
        reply["peak_mib"] = 500.0
    assert train.report("images", "float32", replies)
    replies[0][-1]["loss"] += 1e-3
    assert not train.report("images", "float32", replies) and train.report("images", "bfloat16", replies)


def test_a_peer_that_fails_or_trains_something_else_is_an_error(tmp_path: Path) -> None:
    ours = stub(tmp_path / "ours.py")
    with pytest.raises(PeerError, match="the stub ran out of luck"):
        train.take_turns(ours, stub(tmp_path / "peer.py", fails=1), pairs=3)
    with pytest.raises(PeerError, match="different numbers of parameters"):
        train.take_turns(ours, stub(tmp_path / "peer.py", learning=11), pairs=1)


def test_a_missing_environment_of_a_peer_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["train", "--quick", "--environment", str(tmp_path / "none")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "make it with --install" in said.err
    (tmp_path / "file").write_text("")
    assert peers.main(["train", "--install", "--environment", str(tmp_path / "file")]) == 1
    assert "cannot be made" in capsys.readouterr().err


def test_both_batches_of_a_peer_hold_the_same_tokens(tmp_path: Path) -> None:
    """Its rows have the expanded image where ours have one placeholder; texts never contain the image token."""
    config = {
        "model_type": "llava",
        "image_token_index": 384,
        "text_config": {"model_type": "llama", "vocab_size": 500},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for case in train.make_cases(tmp_path, tmp_path):
        ours, theirs = torch.load(case.ours), torch.load(case.peer)
        images = 4 * (case.name == "images")
        assert (theirs["input_ids"] == 384).sum() == images * 4
        kept = torch.ones(theirs["input_ids"].shape[1], dtype=torch.bool)
        kept[train.PLACE : train.PLACE + images] = images == 0
        for key in ("input_ids", "labels", "attention_mask"):
            mine = torch.cat([ours[key][:, : train.PLACE], ours[key][:, train.PLACE + bool(images) :]], 1)
            assert torch.equal(mine.long(), theirs[key][:, kept].long())
        assert (ours["labels"] != -100).sum() == (theirs["labels"] != -100).sum()


STUB_ENGINE = """\
import json, sys
speed, wrong, fails = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def say(**reply):
    print(json.dumps(reply), flush=True)
say(version="stub 1", threads=1)
for turn, line in enumerate(sys.stdin):
    if turn == fails:
        sys.exit("the stub ran out of luck")
    with open(line.strip()) as file:
        work = json.load(file)
    tokens = [[len(ids) + k + wrong for k in range(work["new_tokens"])] for ids in work["prompts"]]
    say(seconds=(turn + 1) / speed, tokens=tokens)
"""

STUB_SERVER = """\
import http.server, json, sys, time
port, wrong, fails = int(sys.argv[sys.argv.index("--port") + 1]), int(sys.argv[1]), int(sys.argv[2])
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def log_message(self, *_): pass
    def send(self, kind, text):
        self.send_response(200); self.send_header("Content-Type", kind); self.end_headers()
        self.wfile.write(text.encode())
    def do_GET(self):
        self.send("application/json", json.dumps({"data": [{"id": "stub"}]}))
    def do_POST(self):
        Handler.asked += 1
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert given["stream"] and given["model"] == "stub"
        if 0 < fails <= Handler.asked:
            sys.stderr.write("the stub ran out of luck\\n"); sys.stderr.flush(); __import__("os")._exit(3)
        words = [" " + str(len(given["messages"]) + wrong)] * given["max_tokens"]
        events = [{"choices": [{"delta": {"content": word}}]} for word in ["", *words]] + [{"choices": [], "usage": {}}]
        self.send("text/event-stream", "".join(f"data: {json.dumps(e)}\\n\\n" for e in events) + "data: [DONE]\\n\\n")
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def environment(root: Path, program: str, *words: object) -> str:
    """The Python of a folder like a virtual environment, which runs `program` with `words` and what it is given."""
    python = root / "bin" / "python"
    python.parent.mkdir(parents=True)
    (root / "program.py").write_text(program, encoding="utf-8")
    command = " ".join(f"'{word}'" for word in (PYTHON, root / "program.py", *words))
    python.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return str(python)


@pytest.fixture
def case(tiny_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> generate.Case:
    monkeypatch.setattr(process, "PAUSE", 0.0)
    loads = [generate.small(load) for load in generate.LOADS]
    return generate.Case("vllm", "float32", {}, {}, loads, generate.dimensions(tiny_dirs["chat"]))


def compare(case: generate.Case, ours: str, peer: str, folder: Path, **flags: object) -> list[bool]:
    args = argparse.Namespace(**{"pairs": 2, "quick": False, "shapes": None, **flags})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", ours)
        return generate.compare(case, args, peer, folder, Ceilings(1e12, 1e10, 1e10))


def test_every_shape_is_answered_in_turns(
    case: generate.Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, peer = (environment(tmp_path / str(speed), STUB_ENGINE, speed, 0, -1) for speed in (2.0, 1.0))
    reached = compare(case, ours, peer, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == [load.name for load in case.loads]
    assert {row[3] for row in rows} == {"2.00 (2.00-2.00)"}
    counts = [2 * load.shape.questions * load.shape.images for load in case.loads]
    assert [row[5] for row in rows] == [f"{count} of {count}" for count in counts]
    assert reached == [row[4] in ("", ">= 1.3", ">= 1.5", ">= 1.6") for row in rows] and not reached[0]
    assert [row[0] for row in rows if row[6].endswith("(decoding 100%)")] == ["stream"]  # its prompt is cached
    assert all(compare(case, ours, peer, tmp_path, quick=True, shapes=["POPE", "GQA"]))


def test_other_tokens_fail_in_float32_only(case: generate.Case, tmp_path: Path) -> None:
    ours, peer = (environment(tmp_path / str(wrong), STUB_ENGINE, 9.0, wrong, -1) for wrong in (0, 1))
    assert not any(compare(case, ours, peer, tmp_path, quick=True))
    assert all(compare(replace(case, precision="bfloat16"), ours, peer, tmp_path, quick=True))


def test_too_few_tokens_fail_even_if_equal() -> None:
    load = generate.LOADS[3]
    given = generate.Case("transformers", "float32", {}, {}, [load], Shape(8, 8, 1, 1, 1, 8))
    reply = {"seconds": 1.0, "tokens": [[5] * 63]}
    assert generate.report(load, given, [[reply] * 2] * 2, (0.5, "tower 100%")) == (True, False)
    reply["tokens"] = [[5] * 64]
    assert generate.report(load, given, [[reply] * 2] * 2, (0.5, "tower 100%")) == (True, True)


def test_a_peer_that_dies_is_named_and_the_others_are_measured(
    case: generate.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM has no environment, then dies in its third turn; transformers answers."""
    monkeypatch.setattr(generate, "make_model", lambda *_, **__: (tmp_path, tmp_path))
    monkeypatch.setattr(generate, "make_cases", lambda peer, *_: [replace(case, peer=peer, loads=case.loads[:1])])
    environment(tmp_path / "transformers", STUB_ENGINE, 1.0, 0, -1)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "transformers/bin/python"))
    argv = ["generate", "--quick", "--environments", str(tmp_path)]
    assert peers.main(argv) == 0
    assert "vllm is left out" in capsys.readouterr().err
    assert peers.main([*argv, "--peers", "vllm"]) == 1  # nothing was measured
    capsys.readouterr()
    environment(tmp_path / "vllm", STUB_ENGINE, 1.0, 0, 2)
    assert peers.main(argv) == 1
    said = capsys.readouterr()
    assert "vllm failed" in said.err and "the stub ran out of luck" in said.err and said.out.count("| POPE |") == 1
    assert peers.main([*argv, "--shapes", "VQA"]) == 1 and "VQA is unknown" in capsys.readouterr().err


def test_llama_cpp_continues_text_of_a_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both precisions are measured on exports of the model, and a missing model is one sentence."""
    monkeypatch.setattr(generate, "make_model", lambda *_, **__: pytest.fail("other peers' model is made"))
    monkeypatch.setattr(sys, "executable", environment(tmp_path / "llama.cpp", STUB_ENGINE, 1.0, 0, -1))
    argv = ["generate", "--quick", "--peers", "llama.cpp", "--environments", str(tmp_path), "--text-model"]
    assert peers.main([*argv, str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "llama.cpp is left out" in said and "--text-model" in said
    assert peers.main([*argv, str(make_base(tmp_path / "base"))]) == 0
    said = capsys.readouterr().out
    assert said.count("| text stream |") == 2 and "stub 1, bfloat16" in said and "stub 1, 8 bit" in said
    work = json.loads(Path(generate.write_work(tmp_path, generate.TEXT, 0, 56)).read_text(encoding="utf-8"))
    assert [len(ids) for ids in work["prompts"]] == [40] and min(work["prompts"][0]) > 0
    assert work["images"] == [""] and work["cached"]


def test_a_reply_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="replied b'hello.*not JSON"):
        Process([environment(tmp_path, "print('hello')")])


@pytest.mark.slow
def test_our_engine_answers_as_itself_in_the_place_of_a_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = """\
import json, sys
from pathlib import Path
from benchmarks.peers import engines
given = json.loads(sys.argv[-1])
assert given["engine"] == "vllm" and engines.image_token(given["model"]) == 384
replies = engines.open_replies()
print("this is not a reply")
chat = str(Path(given["model"]).parent / "chat")
engines.serve_answers(engines.Llava(chat, given["dtype"]), replies)
"""
    environment(tmp_path / "vllm", program)
    argv = ["--peers", "vllm", "--dtypes", "float32", "--pairs", "1", "--environments", str(tmp_path)]
    assert peers.main(["generate", "--quick", *argv]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("%) |")]
    assert [row.split("|")[1].strip() for row in rows] == [load.name for load in generate.LOADS]


def serving(monkeypatch: pytest.MonkeyPatch, root: Path, ours: tuple[int, int], peer: tuple[int, int]) -> list[str]:
    """Stub servers in the place of both sides, and the arguments to compare them."""
    monkeypatch.setattr(serve, "make_model", lambda *_, **__: (root, root))
    monkeypatch.setattr(process, "PAUSE", 0.0)
    python = environment(root / "ours", STUB_SERVER, *ours)
    monkeypatch.setattr(serve, "our_commands", lambda *_: [[python, "--port", "{port}"]])
    environment(root / "vllm", STUB_SERVER, *peer)
    return ["serve", "--quick", "--pairs", "2", "--environments", str(root)]


def test_both_servers_get_all_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main(serving(monkeypatch, tmp_path, (0, -1), (0, -1))) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if " of 4 |" in line]
    assert len(rows) == 12 and {row[-2].strip() for row in rows} == {"4 of 4"}


def test_a_server_with_other_answers_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main([*serving(monkeypatch, tmp_path, (0, -1), (1, -1)), "--dtypes", "float32"]) == 1
    assert "0 of 4" in capsys.readouterr().out


def test_a_server_that_dies_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main([*serving(monkeypatch, tmp_path, (0, -1), (0, 7)), "--dtypes", "float32"]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "ended: the stub ran out of luck" in said.err
    assert peers.main(["serve", "--environments", str(tmp_path / "none")]) == 1
    assert "make it with --install" in capsys.readouterr().err


def test_our_controller_answers_the_clients() -> None:
    plan = serve.Plan(pixels=56, clients=3, tokens=4, short=2)
    with live_controller() as controller, live_worker(StubEngine(), controller=controller.url, name=CHAT):
        until(lambda: controller.registry.models() == [CHAT])
        ours: Any = SimpleNamespace(url=controller.url, model=CHAT, extra={})
        for name in serve.LOADS:
            done = asyncio.run(serve.measure(ours, plan, name, 0))
            words = 2 if name == "two turns" else 4
            assert [len(reply.text.split()) for reply in done.replies] == [words] * 3
            assert all(0 < reply.first <= reply.end <= done.seconds for reply in done.replies)
        wrong: Any = SimpleNamespace(url=controller.url, model="other", extra={})
        with pytest.raises(PeerError, match="replied 404"):
            asyncio.run(serve.measure(wrong, plan, "one image", 0))


def test_the_commands_of_our_server_are_understood() -> None:
    controller, worker = serve.our_commands(Path("chat"), "bfloat16")
    for command in (controller, worker):
        module = importlib.import_module(command[2])
        words = [word.replace("{port}", "1").replace("{url}", "http://127.0.0.1:1") for word in command[3:]]
        assert module.build_parser().parse_args(words).port in (0, 1)


def test_a_failed_installation_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each call of pip runs in the environment of the peer; the first one that fails is named with its reason."""
    program = "import sys\nsys.stderr.write(f'first\\nno {sys.argv[4]}\\n')\nsys.exit('torch' in sys.argv[4])"
    monkeypatch.setattr(process.venv, "create", lambda root, with_pip: environment(root, program))
    assert peers.main(["serve", "--install", "--environments", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "vllm: pip install torch===2.13.0" in said and said.endswith("no torch===2.13.0\n")
