"""Our model against a live peer with the same weights: `python -m benchmarks.peers train`.

`train` compares training steps (forward, backward, AdamW; frozen tower) with `LlavaForConditionalGeneration` of
transformers 5. The peer runs in an environment of its own, made by `--install`, on the export of `llava export --format
hf-llava`, with its defaults: sdpa attention, padded batches, logits at every position, no gradient checkpointing. Both
processes use fused AdamW and, for bfloat16, autocast with float32 weights, as both Trainers do; they take turns, a
step each, and the ratio is the median over the pairs of turns. Peaks are high-water marks of resident memory over the
steps. The exit status is 1 if a target is missed or the peer cannot be run.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import IO, Any, Final, NamedTuple

import torch
from transformers import LlavaConfig

from benchmarks.measure import settings
from benchmarks.peer_train import serve_steps
from benchmarks.train_step import TEXTS, text_batch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.model.export import export
from tests.tiny import make_chat, make_clip_tower

ROOT: Final = Path(__file__).parents[1]
# What an environment needs beside the torch of this one.
REQUIREMENTS: Final = {"transformers": ("transformers==5.19.0",)}
TIME, MEMORY = 0.7, 0.6  # targets, ours / peer
LOSS: Final = {"float32": 1e-4, "bfloat16": 2**-8}  # targets: absolute difference; relative difference
SECONDS = 600.0  # for a reply
IMAGE_TEXTS, PLACE = tuple(length // 2 for length in TEXTS), 5  # text tokens of rows with an image, and its position


class PeerError(Exception):
    """A peer that cannot be installed, started or asked."""


def python_of(environment: Path) -> Path:
    return environment.absolute() / "bin" / "python"


def install(environment: Path, peer: str) -> None:
    """Make a virtual environment with the requirements of `peer` and the torch of this one."""
    packages = (f"torch=={torch.__version__.split('+')[0]}", *REQUIREMENTS[peer])
    try:
        venv.create(environment, with_pip=True)
        command = [str(python_of(environment)), "-m", "pip", "install", "--quiet", *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise PeerError(f"the environment {environment} cannot be made: {error}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise PeerError(f"pip could not install {' '.join(packages)} in {environment}: {reason}")


class Process:
    """A program that replies to each line on its stdin with one JSON line, after a first one when it is ready."""

    def __init__(self, command: Sequence[str]) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, cwd=ROOT, env=environment
            )
        except OSError as error:
            raise PeerError(f"{command[0]} cannot be run: {error}") from error
        self._name = " ".join(command[:3])
        self.ready = self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = b""
        if select.select([self._process.stdout], [], [], SECONDS)[0]:
            line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines() or ["it printed no error"]
            self.close()
            raise PeerError(f"{self._name} ended or did not reply within {SECONDS:.0f} s: {said[-1]}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def turn(self) -> dict[str, Any]:
        """Ask for one step and wait for it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_reply` says why
        return self._reply()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


class Case(NamedTuple):
    """A batch in the form of each side, as files."""

    name: str
    ours: Path
    peer: Path


def make_model(root: Path, quick: bool) -> tuple[Path, Path]:
    """A chat checkpoint with random weights (LLaMA and a CLIP tower), and its export."""
    if quick:
        chat = make_chat(root / "chat", make_clip_tower(root / "tower"), mm_vision_select_layer=-2, vocab_size=2000)
    else:
        tower = make_clip_tower(root / "tower", hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                                num_attention_heads=8, image_size=336)  # fmt: skip
        chat = make_chat(root / "chat", tower, vocab_size=32000, hidden_size=768, intermediate_size=2048,
                         num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=12, mm_hidden_size=512,
                         mm_vision_image_size=336, mm_vision_select_layer=-2)  # fmt: skip
    export(chat, root / "export")
    return chat, root / "export"


def make_cases(root: Path, exported: Path) -> list[Case]:
    """Batches of 4 rows, with an image each and without; the peer's have the expanded image token."""
    config = LlavaConfig.from_pretrained(exported)
    token, vocabulary = config.image_token_index, config.text_config.vocab_size
    pixels, patch = config.vision_config.image_size, config.vision_config.patch_size
    cases = []
    for name, lengths in (("images", IMAGE_TEXTS), ("texts", TEXTS)):
        ours = text_batch(lengths, vocabulary)
        for key in ("input_ids", "labels"):
            ours[key][ours[key] == token] = 9
        theirs = {key: ours[key] for key in ("input_ids", "labels", "attention_mask")}
        if name == "images":
            ours["images"] = torch.randn(len(lengths), 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
            fills = {"input_ids": token, "labels": IGNORE_INDEX, "attention_mask": True}
            theirs = {key: expand(theirs[key], (pixels // patch) ** 2, fill) for key, fill in fills.items()}
            theirs["pixel_values"] = ours["images"]
            ours["input_ids"][:, PLACE] = IMAGE_TOKEN_INDEX
        theirs["attention_mask"] = theirs["attention_mask"].long()
        case = Case(name, root / f"{name}-ours.pt", root / f"{name}-peer.pt")
        torch.save(ours, case.ours)
        torch.save(theirs, case.peer)
        cases.append(case)
    return cases


def expand(table: torch.Tensor, count: int, fill: int) -> torch.Tensor:
    """Replace the column of the image by `count` columns of `fill`."""
    middle = table.new_full((len(table), count), fill)
    return torch.cat([table[:, :PLACE], middle, table[:, PLACE + 1 :]], dim=1)


def serve_ours(model: str, batch: str, bf16: bool) -> None:
    """The process with our model: `python -m benchmarks.peers ours SETTINGS`."""
    ours: Any = load_pretrained_model(model, device="cpu", dtype=torch.float32)[1]
    serve_steps(ours, torch.load(batch), bf16, "ours")


def take_turns(ours: Sequence[str], peer: Sequence[str], pairs: int) -> tuple[dict[str, Any], list[list[Any]]]:
    """What the peer said when ready, and the replies of ours and of the peer; the first pair is a warm-up."""
    processes: list[Process] = []
    try:
        for command in (ours, peer):
            processes.append(Process(command))
        if len({process.ready["learning"] for process in processes}) > 1:
            raise PeerError(f"different numbers of parameters are trained: {[one.ready for one in processes]}")
        replies: list[list[Any]] = [[], []]
        for _ in range(pairs + 1):
            for process, said in zip(processes, replies):
                said.append(process.turn())
        return processes[1].ready, replies
    finally:
        for process in processes:
            process.close()


def report(title: str, dtype: str, replies: list[list[Any]]) -> bool:
    """Print the lines of a case; true if all targets are reached."""
    ours, peer = replies
    ratios = [mine["seconds"] / theirs["seconds"] for mine, theirs in zip(ours[1:], peer[1:])]
    mine, theirs = (median(reply["seconds"] for reply in side[1:]) for side in (ours, peer))
    ratio, reached = median(ratios), []
    note = f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    print(f"| {title}, time | {theirs:.3f} s | {mine:.3f} s | {note} | <= {TIME} |")
    reached.append(ratio <= TIME)
    for key, name in (("peak_mib", "peak memory"), ("beyond_mib", "peak beyond weights, gradients and optimizer")):
        mine, theirs = ours[-1][key], peer[-1][key]
        target = f"<= {MEMORY}" if key == "peak_mib" else ""
        print(f"| {title}, {name} | {theirs:.0f} MiB | {mine:.0f} MiB | {mine / theirs:.2f} | {target} |")
        reached.append(not target or mine / theirs <= MEMORY)
    losses = [(one["loss"], other["loss"]) for one, other in zip(ours, peer)]
    scale = 1.0 if dtype == "float32" else losses[0][1]
    worst, limit = max(abs(one - other) for one, other in losses), LOSS[dtype] * scale
    first, last = losses[0], losses[-1]
    print(f"| {title}, loss of the first and last step | {first[1]:.5f}, {last[1]:.5f} | {first[0]:.5f}, {last[0]:.5f} "
          f"| differs by {worst:.1e} | <= {limit:.1e} |")  # fmt: skip
    reached.append(worst <= limit)
    return all(reached)


def train(args: argparse.Namespace) -> int:
    python = python_of(args.environment)
    if args.install:
        install(args.environment, "transformers")
    if not python.exists():
        raise PeerError(f"{args.environment} holds no environment with transformers 5; make it with --install.")
    reached: list[bool] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        chat, exported = make_model(root, args.quick)
        for case in make_cases(root, exported):
            for dtype in LOSS:
                mine, theirs = (
                    json.dumps({"model": str(model), "batch": str(batch), "bf16": dtype == "bfloat16"})
                    for model, batch in ((chat, case.ours), (exported, case.peer))
                )
                ours = [sys.executable, "-m", "benchmarks.peers", "ours", mine]
                ready, replies = take_turns(ours, [str(python), "-m", "benchmarks.peer_train", theirs], args.pairs)
                if not reached:
                    print(f"Median of {args.pairs} pairs of turns (range), {ready['threads']} threads.\n")
                    print(f"| step | {ready['version']} | ours | ours / peer | target |\n|---|---|---|---|---|")
                reached.append(report(f"{case.name}, {dtype}", dtype, replies))
    return 0 if args.quick or all(reached) else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    flags = commands.add_parser("train", help="training steps against transformers 5")
    flags.add_argument("--environment", type=Path, default=Path("work_dirs/peers/transformers"),
                       help="virtual environment of the peer (default: %(default)s)")  # fmt: skip
    flags.add_argument("--install", action="store_true", help="make the environment first (6 GB)")
    flags.add_argument("--pairs", type=int, default=5, help="pairs of turns (default: %(default)s)")
    flags.add_argument("--quick", action="store_true", help="a tiny model: checks that it runs, measures nothing")
    args = parser.parse_args(argv)
    try:
        return train(args)
    except PeerError as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"]:
        del sys.argv[1]
        serve_ours(**settings())
    else:
        sys.exit(main())
