"""`python -m benchmarks.demo` (make demo): real pictures scored over HTTP by every embedded reward model."""
