"""Correctness and speed on one GPU in eight minutes: `python -m benchmarks.gpu`."""
