"""Speed, memory and loading, each as a ratio against the reference's way of doing it: `python -m benchmarks.run`."""
