"""Reward hacking shown on purpose and stopped: ``python -m benchmarks.hacking``, and the report that it writes."""
