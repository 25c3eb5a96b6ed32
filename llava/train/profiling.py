"""Traces of chosen training steps by `torch.profiler`, and CUDA memory snapshots.

`--profile_step_start` and `--profile_step_end` choose the steps, `--memory_snapshot` records allocations. Every rank
writes to `profile/` of the output directory. Perfetto and TensorBoard open the traces, https://pytorch.org/memory_viz
the snapshots.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback, TrainerState

from llava.arguments import TrainingArguments

logger = logging.getLogger(__name__)
FOLDER: Final = "profile"
SLOWEST: Final = 50  # operations in the table
MAX_ENTRIES: Final = 100_000  # allocations and frees in a snapshot, the latest ones, each with its stack


class StepProfiler(TrainerCallback):
    """Traces the steps `first` to `last`, each a range `ProfilerStep#N`, and writes the trace and a table.

    The step before `first` starts the tracer of the GPU, which takes seconds, and is not in the trace.
    """

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last
        self._traced: list[int] = []
        self._profiler: profile | None = None
        self._step: record_function | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        step = state.global_step + 1
        if not self.first - 1 <= step <= self.last:
            return
        if self._profiler is None:
            self._profiler = _prepared(args.device)
        if step < self.first:
            return
        if not self._traced:
            self._profiler.start_trace()
        self._traced.append(step)
        self._step = record_function(f"ProfilerStep#{step}")  # the name that TensorBoard looks for
        self._step.__enter__()  # type: ignore[no-untyped-call]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._step is None:
            return
        self._step.__exit__(None, None, None)
        self._step = None
        if state.global_step >= self.last:
            self._finish(args)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        self._finish(args)
        if not self._traced:
            logger.warning(
                "--profile_step_start %d: this run had no step %d to %d, so there is no trace.",
                *(self.first, self.first, self.last),
            )

    def _finish(self, args: TrainingArguments) -> None:
        """Stop the tracer and write what it recorded."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if not self._traced:
            profiler.start_trace()  # a tracer that was only prepared cannot be stopped
        profiler.stop_trace()  # waits for the GPU
        if not self._traced:
            return
        window = f"steps{self._traced[0]}-{self._traced[-1]}"
        if args.memory_snapshot and args.device.type == "cuda":
            write_snapshot(args, window)
        trace = Path(args.output_dir) / FOLDER / f"rank{args.process_index}_{window}.pt.trace.json.gz"
        order = "self_device_time_total" if args.device.type == "cuda" else "self_cpu_time_total"
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            table = profiler.key_averages().table(sort_by=order, row_limit=SLOWEST, max_name_column_width=80)
            trace.with_name(trace.name.replace(".pt.trace.json.gz", ".txt")).write_text(table + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning("The trace %s cannot be written: %s.", trace, error)
            return
        logger.info("Trace of steps %d to %d: %s.", self._traced[0], self._traced[-1], trace)


def _prepared(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities, record_shapes=True)
    profiler.prepare_trace()
    return profiler


def profiling_callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """The `StepProfiler` of the flags; without them nothing, so that a run pays nothing."""
    if args.profile_step_start is None:
        return []
    return [StepProfiler(args.profile_step_start, args.profile_step_end or args.profile_step_start)]


@contextmanager
def memory_history(args: TrainingArguments) -> Iterator[None]:
    """Record CUDA allocations during the block with `--memory_snapshot`; if memory runs out, write them, then raise."""
    if args.memory_snapshot and args.device.type != "cuda":
        logger.warning("--memory_snapshot records CUDA memory; on %s there is nothing to record.", args.device.type)
    if not args.memory_snapshot or args.device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
    try:
        yield
    except torch.cuda.OutOfMemoryError:  # its traceback still holds the tensors
        write_snapshot(args, "out_of_memory")
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def write_snapshot(args: TrainingArguments, name: str) -> None:
    """Write the recorded allocations and the memory in use of this rank to `profile/`."""
    file = Path(args.output_dir) / FOLDER / f"rank{args.process_index}_{name}.memory.pickle"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(file))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        logger.warning("The memory snapshot cannot be written to %s: %s.", file, error)
        return
    logger.info("Memory snapshot: %s.", file)
