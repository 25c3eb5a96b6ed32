"""Time to the first batch and memory of data workers for a large annotation file, ours and the reference's.

    python -m benchmarks.data                                          both, in separate processes
    python -m benchmarks.data '{"grouped": true}'                      with --group_by_modality_length True
    python -m benchmarks.data '{"rows": 665000, "only": "reference"}'  one of them

Rows resemble those of the published mixture: 1.5 KB, one to four questions, four fifths with an image. Memory is the
proportional set size of all processes, without the pages of the memory-mapped file, which belong to the page cache.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.measure import measure, settings

WORDS = ("the", "image", "shows", "a", "red", "bus", "near", "two", "people", "waiting,", "café", '"Where\nis it?"')
PIXELS = 28


def write(root: Path, rows: int) -> Path:
    """Write `root/data.json` and the one image that all its rows use."""
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(root / "a.png")
    draw = random.Random(0)
    path = root / "data.json"
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            turns = []
            for _ in range(draw.randint(1, 4)):
                turns.append({"from": "human", "value": " ".join(draw.choices(WORDS, k=12))})
                turns.append({"from": "gpt", "value": " ".join(draw.choices(WORDS, k=60))})
            record: dict[str, Any] = {"id": f"{index:012d}", "conversations": turns}
            if index % 5:
                record["image"] = "a.png"
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            file.write(("[" if index == 0 else ",\n") + json.dumps(record))
        file.write("]\n")
    return path


def arguments(path: Path) -> SimpleNamespace:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=PIXELS)
    return SimpleNamespace(
        image_folder=str(path.parent), image_aspect_ratio="pad", is_multimodal=True, image_processor=processor
    )


def reference_dataset(path: Path, tokenizer: Any, args: Any) -> Any:
    """The published approach: one list of dictionaries, which forked workers copy page by page as they use it."""
    from llava.data.dataset import LazySupervisedDataset

    class Listed(LazySupervisedDataset):
        def __init__(self) -> None:
            self.data_path, self.tokenizer, self.data_args = str(path), tokenizer, args
            self.template, self.skip_bad = template, False
            self.records: Any = json.loads(path.read_text(encoding="utf-8"))
            import torch

            self._flags = torch.zeros(3, len(self.records), dtype=torch.uint8)

        @property
        def modality_lengths(self) -> list[int]:  # type: ignore[override]
            """Counted record by record before the first batch."""
            counts = [(row, sum(len(turn["value"].split()) for turn in row["conversations"])) for row in self.records]
            return [count if "image" in row else -count for row, count in counts]

    from llava.conversation import get_template

    template = get_template("v1")
    return Listed()


def memory_mib(pids: list[int]) -> float:
    """Total proportional set size of the processes without file pages, in MiB."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1])
    return total / 1024


def run(path: Path, only: str, workers: int, batches: int, grouped: bool) -> dict[str, float]:
    """Open the file and read `batches` batches with `workers` workers; returns seconds and MiB."""
    import torch
    from transformers.trainer_utils import seed_worker

    from llava.data.dataset import DataCollatorForSupervisedDataset, LazySupervisedDataset, start_worker
    from llava.data.sampler import LengthGroupedSampler
    from tests.tiny import make_tokenizer

    tokenizer = make_tokenizer(path.parent / f"tokenizer-{only}")
    tokenizer.model_max_length = 2048
    args = arguments(path)
    begin = time.perf_counter()
    if only == "reference":
        dataset = reference_dataset(path, tokenizer, args)
    else:
        dataset = LazySupervisedDataset(str(path), tokenizer, args, "v1")
    generator = torch.Generator().manual_seed(0)
    sampler: Any = torch.utils.data.RandomSampler(dataset, generator=generator)
    if grouped:
        sampler = LengthGroupedSampler(16, 8, dataset.modality_lengths, generator, group_by_modality=True)
    loader = torch.utils.data.DataLoader(
        dataset,
        16,
        sampler=sampler,
        num_workers=workers,
        collate_fn=DataCollatorForSupervisedDataset(tokenizer),
        worker_init_fn=start_worker if only == "ours" else seed_worker,
    )
    alone = memory_mib([os.getpid()])
    batch = iter(loader)
    next(batch)
    first = time.perf_counter() - begin
    for _ in range(batches):
        next(batch)
    children = [worker.pid for worker in getattr(batch, "_workers", [])]
    together = memory_mib([os.getpid(), *children])
    figures = {"first_batch_seconds": first, "workers_add_mib": together - alone, "total_mib": together}
    if only == "ours":
        dataset.check(wait=True)
        figures["all_checked_seconds"] = time.perf_counter() - begin
    return figures


def main() -> int:
    given = {"rows": 665_000, "workers": 4, "batches": 200, "grouped": False, **settings()}
    if "file" in given:
        print(json.dumps(run(Path(given["file"]), *(given[k] for k in ("only", "workers", "batches", "grouped")))))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        path = write(Path(directory), given["rows"])
        print(f"{given['rows']} rows, {path.stat().st_size / 2**20:.0f} MiB", flush=True)
        for only in [given["only"]] if "only" in given else ["reference", "ours"]:
            figures = measure("benchmarks.data", **{**given, "file": str(path), "only": only})
            print(only, json.dumps({name: round(value, 2) for name, value in figures.items()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
