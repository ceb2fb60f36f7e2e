"""Measurements, each rerun by one command: `python -m benchmarks.<name>`. Results land in `results/`."""
