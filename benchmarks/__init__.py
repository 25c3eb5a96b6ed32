"""Benchmarks of speed, memory and loading as ratios against the reference: `python -m benchmarks.run`."""
