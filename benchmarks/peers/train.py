"""Training steps with a frozen tower against `LlavaForConditionalGeneration` of transformers 5.

The peer has its defaults: sdpa attention, padded batches, logits at every position, no gradient checkpointing. Both
processes use fused AdamW and, for bfloat16, autocast with float32 weights, as both Trainers do. Peaks are high-water
marks of resident memory over the steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import torch
from transformers import LlavaConfig

from benchmarks.peers import process
from benchmarks.peers.models import make_model
from benchmarks.peers.process import PeerError
from benchmarks.train_step import TEXTS, text_batch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

TIME, MEMORY = 0.7, 0.6  # targets, ours / peer
LOSS: Final = {"float32": 1e-4, "bfloat16": 2**-8}  # targets: absolute difference; relative difference
IMAGE_TEXTS, PLACE = tuple(length // 2 for length in TEXTS), 5  # text tokens of rows with an image, and its position


class Case(NamedTuple):
    """A batch in the form of each side, as files."""

    name: str
    ours: Path
    peer: Path


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


def take_turns(ours: Sequence[str], peer: Sequence[str], pairs: int) -> tuple[dict[str, Any], list[list[Any]]]:
    """What the peer said when ready, and the replies of ours and of the peer; the first pair is a warm-up."""
    with process.started(ours, peer) as processes:
        if len({one.ready["learning"] for one in processes}) > 1:
            raise PeerError(f"different numbers of parameters are trained: {[one.ready for one in processes]}")
        return processes[1].ready, process.take_turns(processes, [""] * (pairs + 1))


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


def run(args: argparse.Namespace) -> int:
    python = process.interpreter(args.environment, "transformers", args.install)
    reached: list[bool] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        chat, exported = make_model(root, args.quick)
        for case in make_cases(root, exported):
            for dtype in LOSS:
                ours, peer = (
                    [program, "-m", "benchmarks.peers.train_steps", json.dumps(
                        {"engine": engine, "model": str(model), "batch": str(batch), "bf16": dtype == "bfloat16"}
                    )]
                    for program, engine, model, batch in (
                        (sys.executable, "llava", chat, case.ours), (python, "transformers", exported, case.peer)
                    )
                )  # fmt: skip
                ready, replies = take_turns(ours, peer, args.pairs)
                if not reached:
                    print(f"Median of {args.pairs} pairs of turns (range), {ready['threads']} threads.\n")
                    print(f"| step | {ready['version']} | ours | ours / peer | target |\n|---|---|---|---|---|")
                reached.append(report(f"{case.name}, {dtype}", dtype, replies))
    return 0 if args.quick or all(reached) else 1
