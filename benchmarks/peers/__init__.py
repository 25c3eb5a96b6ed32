"""Live peers with the same weights: `python -m benchmarks.peers train | generate | serve`."""
