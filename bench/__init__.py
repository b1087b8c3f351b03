"""Benchmarks over one registry of real shapes: `python -m bench --help`, or `pytest bench --benchmark-only`."""
