"""Reward hacking provoked, without and with the guard: ``python -m benchmarks.hacking``, and its report."""
