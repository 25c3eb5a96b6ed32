"""The parts in the order they run, with the expected seconds of each on one GPU."""

from __future__ import annotations

from typing import Final

from benchmarks.gpu import answers, inference, loading
from benchmarks.gpu.curves import curves
from benchmarks.gpu.equality import engine_equals_generate
from benchmarks.gpu.golden import golden
from benchmarks.gpu.machine import machine
from benchmarks.gpu.numerics import numerics
from benchmarks.gpu.runner import Part
from benchmarks.gpu.serving import serving
from benchmarks.gpu.suite import tests
from benchmarks.gpu.training import training

PARTS: Final = (
    Part("machine", 15, machine),
    Part("golden", 20, golden),
    Part("numerics", 15, numerics),
    Part("engine", 30, engine_equals_generate),
    Part("curves", 40, curves),
    Part("weights", 10, inference.weights),
    Part("prefill", 25, inference.prefill),
    Part("decode", 60, inference.decode),
    Part("generate", 25, answers.generate),
    Part("pope", 45, answers.pope),
    Part("training", 50, training),
    Part("loading", 30, loading.loading),
    Part("quantized", 20, loading.quantized),
    Part("serving", 30, serving),
    Part("tests", 45, tests),
)
