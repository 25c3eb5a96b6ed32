"""Run the main benchmarks and print a table: `python -m benchmarks.run [--write] [--quick] [train|load|questions …]`.

Each row runs the reference implementation and ours on the same weights, in separate processes. `--write` puts the table
into benchmarks/README.md. `--quick` uses a small model as a smoke test.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.eval import QUICK, SHAPES, Ways
from benchmarks.floor import peaks
from benchmarks.measure import measure
from benchmarks.synthetic import Size, make_checkpoint

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
Row = tuple[str, str, str, str]


def pair(module: str, chat: Path, **settings: object) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the reference implementation and of ours."""
    theirs, ours = (measure(module, chat=str(chat), reference=reference, **settings) for reference in (True, False))
    return theirs, ours


def row(what: str, theirs: float, ours: float, unit: str) -> Row:
    return what, f"{theirs:.4g} {unit}", f"{ours:.4g} {unit}", f"{ours / theirs:.2f}"


def train(root: Path, quick: bool) -> list[Row]:
    size = Size(tower_width=128, tower_layers=4, width=128, layers=2) if quick else Size(256, 12, 512, 8)
    chat = make_checkpoint(root, size)
    rows, shares = [], []
    width = 256 if quick else 2048
    peak = peaks(torch.float32, width).operations
    for kind in ("stage 2", "stage 1", "texts"):
        theirs, ours = pair("benchmarks.train_step", chat, rows=2 if quick else 4, kind=kind)
        if abs(theirs["first_loss"] - ours["first_loss"]) > 1e-3:
            raise RuntimeError(f"{kind}: losses differ: {theirs['first_loss']} and {ours['first_loss']}")
        label = f"{kind} step" if kind != "texts" else "step of texts of 640, 310, 150 and 90 tokens"
        rows += [
            row(f"{label}, time", theirs["seconds"], ours["seconds"], "s"),
            row(f"{label}, peak memory", theirs["peak_mib"], ours["peak_mib"], "MiB"),
            row(f"{label}, peak beyond weights, gradients and optimizer", theirs["activations_mib"],
                ours["activations_mib"], "MiB"),
        ]  # fmt: skip
        shares.append((f"{label}, share of the matrix peak", theirs, ours))
    peak = max(peak, peaks(torch.float32, width).operations)
    for label, *ways in shares:
        rows.append(row(label, *(100 * way["operations"] / way["seconds"] / peak for way in ways), "%"))
    return rows


def load(root: Path, quick: bool) -> list[Row]:
    size = Size(tower_width=128, tower_layers=4, width=128, layers=2) if quick else Size(1024, 24, 1536, 10)
    chat = make_checkpoint(root, size, torch.float16)
    theirs, ours = pair("benchmarks.load", chat)
    weights = stored_mib(root)
    rows = [
        row(f"load {weights:.0f} MiB in 16 bit, time", theirs["seconds"], ours["seconds"], "s"),
        row(f"load {weights:.0f} MiB in 16 bit, memory", theirs["load_mib"], ours["load_mib"], "MiB"),
        row("the same memory against the weights' size", weights, ours["load_mib"], "MiB"),
    ]
    size = Size(tower_width=128, tower_layers=4, width=128, layers=2) if quick else Size(256, 12, 2048, 14)
    chat = make_checkpoint(root / "mostly language", size, torch.float16)
    packed = measure("benchmarks.load", chat=str(chat), four_bits=True)
    weights = stored_mib(root / "mostly language")
    return [
        *rows,
        row(f"load {weights:.0f} MiB in 4 bit, memory against their size", weights, packed["load_mib"], "MiB"),
    ]


def stored_mib(root: Path) -> float:
    return sum(file.stat().st_size for file in root.glob("*/model*.safetensors")) / 2**20


def questions(root: Path, quick: bool) -> list[Row]:
    size = QUICK if quick else Size()
    ways = Ways(make_checkpoint(root, size), batch=32)
    rows = []
    for shape in SHAPES:
        times = ways.measure(shape, 1 if quick else 3, size.pixels)
        same = "same answers" if times.same else "OTHER ANSWERS"
        label = f"{shape.name}: {shape.questions} questions per image ({same}), questions per second"
        theirs, ours = (times.questions / median(part) for part in (times.reference, times.engine))
        rows.append(row(label, theirs, ours, "/s"))
    return rows


PARTS: dict[str, Callable[[Path, bool], list[Row]]] = {"train": train, "load": load, "questions": questions}


def table(rows: Sequence[Row]) -> str:
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, float32 unless stated"
    lines = [
        f"Measured on: {machine}.",
        "",
        "| measurement | reference | ours | ours / reference |",
        "|---|---|---|---|",
    ]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="parts to measure (default: all)")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/README.md")
    parser.add_argument("--quick", action="store_true", help="a small model: a smoke test whose figures mean nothing")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    for name in arguments.parts or PARTS:
        print(f"measuring: {name}", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            rows += PARTS[name](Path(directory), arguments.quick)
    text = table(rows)
    print(text)
    if arguments.write:
        before, rest = README.read_text(encoding="utf-8").split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
