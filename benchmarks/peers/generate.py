"""Answers through the Python API: our engine against vLLM, `generate` of transformers 5, and llama.cpp.

Prompts are token ids of the published lengths, images have the tower's size, and answers a fixed length; each turn has
new ones. Both sides hold at most 16 requests at a time. Rates are requests per second. In float32, all but one in
twenty answers must have the peer's tokens: rounding may decide between two words that are almost as likely. The last
column is our share of the floor, the time at the peaks measured before, and the longest phase of the floor. llama.cpp
continues text with a language model, in bfloat16 and with weights in 8 bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torchvision.transforms.functional import to_pil_image
from transformers import AutoConfig

from benchmarks import eval as evaluation
from benchmarks.floor import Ceilings, Work, peaks, phase_seconds
from benchmarks.peers import process
from benchmarks.peers.engines import BATCH, IMAGE
from benchmarks.peers.models import make_model
from benchmarks.peers.process import PeerError
from benchmarks.synthetic import Size
from llava.errors import LlavaError
from llava.model import gguf_export
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.train.flops import Shape, shape_of

SAME: Final = 0.95  # share of the answers in float32 that must have the peer's tokens


@dataclass(frozen=True)
class Load:
    """Requests of a turn; `cached`: the same ones were answered just before. `phases`: those of the floor."""

    shape: evaluation.Shape
    cached: bool = False
    image: bool = True
    phases: tuple[str, ...] = ("tower", "prefix", "questions", "decoding")

    @property
    def name(self) -> str:
        return self.shape.name


LOADS: Final = (
    Load(evaluation.Shape("POPE", 18, (25, 29), 2, 2)),
    Load(evaluation.Shape("caption", 1, (14, 14), 64, 8)),
    Load(evaluation.Shape("one image", 16, (20, 40), 64, 1)),
    Load(evaluation.Shape("stream", 1, (20, 40), 64, 1), cached=True, phases=("decoding",)),
    Load(evaluation.Shape("MMBench", 4, (60, 90), 2, 4, options=4)),
    Load(evaluation.Shape("GQA", 31, (26, 40), 3, 1)),
)
TEXT: Final = Load(evaluation.Shape("text stream", 1, (5, 5), 64, 1), cached=True, image=False, phases=("decoding",))
TARGETS: Final[dict[tuple[str, str], dict[str, float]]] = {
    ("vllm", "float32"): {"POPE": 2.5, "caption": 1.3, "one image": 1.5, "stream": 1.6},
    ("vllm", "bfloat16"): {"POPE": 2.0, "caption": 1.3, "one image": 1.3, "stream": 2.0},
    ("llama.cpp", "bfloat16"): {"text stream": 1.1},
    ("llama.cpp", "8 bit"): {"text stream": 1.0},
}


@dataclass(frozen=True)
class Case:
    """A peer in one precision: settings of both processes, and dimensions of our model for the floor."""

    peer: str
    precision: str
    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]
    loads: Sequence[Load]
    dimensions: Shape

    @property
    def itemsize(self) -> int:
        return {"float32": 4, "bfloat16": 2, "8 bit": 1}[self.precision]


def dimensions(model: Path) -> Shape:
    config = AutoConfig.from_pretrained(model)
    return shape_of(config, build_vision_tower(config, model, delay_load=True))


def make_cases(peer: str, dtypes: Sequence[str], chat: Path, exported: Path) -> Iterator[Case]:
    """Comparisons with a peer."""
    for dtype in dtypes:
        theirs = {"engine": peer, "model": str(exported), "dtype": dtype}
        theirs |= {"eager": dtype == "float32"} if peer == "vllm" else {}
        ours = {"engine": "llava", "model": str(chat), "dtype": dtype}
        yield Case(peer, dtype, ours, theirs, LOADS, dimensions(chat))


def make_text_cases(model: Path, folder: Path) -> Iterator[Case]:
    """Comparisons with llama.cpp on exports of a language model."""
    for precision, outtype in (("bfloat16", "bf16"), ("8 bit", "q8_0")):
        [exported], _ = gguf_export.export(model, folder / outtype, outtype=outtype)
        ours = {"engine": "llava", "model": str(model.absolute()), "dtype": "bfloat16", "text_only": True,
                "load_8bit": precision == "8 bit"}  # fmt: skip
        theirs = {"engine": "llama.cpp", "model": str(exported)}
        yield Case("llama.cpp", precision, ours, theirs, [TEXT], shape_of(AutoConfig.from_pretrained(model)))


def small(load: Load) -> Load:
    shape = load.shape
    few = {"questions": min(3, shape.questions), "images": min(2, shape.images), "new_tokens": min(3, shape.new_tokens)}
    return replace(load, shape=replace(shape, **few))


def write_work(folder: Path, load: Load, turn: int, pixels: int) -> str:
    """Write the requests of a turn, and return the path."""
    files: dict[int, str] = {}
    prompts, images = [], []
    for ids, image in evaluation.prompts(load.shape, turn, pixels):
        if not load.image:
            ids.remove(IMAGE)
        elif id(image) not in files:
            files[id(image)] = str(folder / f"{load.name} {turn} {len(files)}.png")
            to_pil_image((image * 64 + 128).clamp(0, 255).byte()).save(files[id(image)])
        prompts.append(ids)
        images.append(files.get(id(image), ""))
    path = folder / f"{load.name} {turn}.json"
    given = {"prompts": prompts, "images": images, "new_tokens": load.shape.new_tokens, "cached": load.cached}
    path.write_text(json.dumps(given), encoding="utf-8")
    return str(path)


def floor(load: Load, case: Case, ceilings: Ceilings, pixels: int) -> tuple[float, str]:
    """Seconds per turn at the ceilings, and the longest phase with its share."""
    work: Work = evaluation.work_of(load.shape, Size(pixels=pixels if load.image else 0), BATCH)
    found = phase_seconds(case.dimensions, work, ceilings, itemsize=case.itemsize)
    seconds = {name: load.shape.images * found[name] for name in load.phases}
    longest = max(seconds, key=lambda name: seconds[name])
    return sum(seconds.values()), f"{longest} {seconds[longest] / sum(seconds.values()):.0%}"


def report(
    load: Load, case: Case, replies: Sequence[Sequence[Mapping[str, Any]]], least: tuple[float, str]
) -> tuple[bool, bool]:
    """Print the line of a load; whether its target is reached, and whether tokens agree where they must."""
    ours, peer = (side[1:] for side in replies)  # the first pair is a warm-up
    count = load.shape.questions * load.shape.images
    ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(ours, peer)]
    mine, theirs = (median(reply["seconds"] for reply in side) for side in (ours, peer))
    target = TARGETS.get((case.peer, case.precision), {}).get(load.name, 0.0)
    pairs = list(chain.from_iterable(zip(one["tokens"], other["tokens"]) for one, other in zip(ours, peer)))
    equal = sum(one == other for one, other in pairs)
    print(f"| {load.name} | {count / theirs:.2f} /s | {count / mine:.2f} /s "
          f"| {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {f'>= {target}' if target else ''} "
          f"| {equal} of {len(pairs)} | {least[0] / mine:.0%} ({least[1]}) |", flush=True)  # fmt: skip
    complete = all(len(tokens) == load.shape.new_tokens for pair in pairs for tokens in pair)
    agree = complete and len(pairs) == count * len(ours) and equal >= SAME * len(pairs)
    return median(ratios) >= target, agree or case.precision != "float32"


def compare(case: Case, args: argparse.Namespace, python: str, folder: Path, ceilings: Ceilings) -> list[bool]:
    """Measure the loads of a case: whether each reached its target (ignored by --quick) and tokens agree."""
    ours, theirs = (
        [program, "-m", "benchmarks.peers.engines", json.dumps(dict(given))]
        for program, given in ((sys.executable, case.ours), (python, case.theirs))
    )
    pixels = 56 if args.quick else 336
    reached = []
    with process.started(ours, theirs) as processes:
        ready = processes[1].ready
        print(
            f"\n{ready['version']}, {case.precision}, {ready['threads']} threads; median of {args.pairs} pairs (range)"
        )
        print("\n| requests | peer | ours | ours / peer | target | equal answers | ours, of the floor |")
        print("|---|---|---|---|---|---|---|")
        for load in case.loads:
            if args.shapes and load.name not in args.shapes:
                continue
            given = small(load) if args.quick else load
            requests = (write_work(folder, given, turn, pixels) for turn in range(-1, args.pairs))
            replies = process.take_turns(processes, requests, 0.0 if args.quick else process.PAUSE)
            fast, agree = report(given, case, replies, floor(given, case, ceilings, pixels))
            reached.append(agree and (fast or args.quick))
    return reached


def run(args: argparse.Namespace) -> int:
    known = {load.name for load in (*LOADS, TEXT)}
    if unknown := set(args.shapes or ()) - known:
        raise PeerError(f"--shapes {', '.join(sorted(unknown))} is unknown; expected {', '.join(sorted(known))}.")
    reached: list[bool] = []
    models: tuple[Path, Path] | None = None  # of our layout, and exported
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        ceilings = {}
        for dtype in (torch.float32, torch.bfloat16):
            peak = peaks(dtype, 64 if args.quick else 2048)
            ceilings[dtype.itemsize] = Ceilings(peak.operations, peak.read, peak.read)
        ceilings[1] = ceilings[2]  # 8-bit weights are multiplied in bfloat16
        for peer in args.peers:
            try:
                if peer == "llama.cpp" and not args.text_model.is_dir():
                    raise PeerError(f"{args.text_model} does not exist; name a language model with --text-model.")
                python = process.interpreter(args.environments / peer, peer, args.install)
            except PeerError as error:
                print(f"{peer} is left out: {error}", file=sys.stderr)
                continue
            try:
                if peer == "llama.cpp":
                    cases = make_text_cases(args.text_model, root)
                else:
                    models = models or make_model(root, args.quick, answers=True)
                    cases = make_cases(peer, args.dtypes, *models)
                for case in cases:
                    reached += compare(case, args, python, root, ceilings[case.itemsize])
            except (PeerError, LlavaError) as error:
                print(f"{peer} failed: {error}", file=sys.stderr)
                reached.append(False)
    return 0 if reached and all(reached) else 1
