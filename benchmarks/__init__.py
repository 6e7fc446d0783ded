"""Measurements: `python -m benchmarks.bench` (make bench). Definitions are in README.md beside this file."""
