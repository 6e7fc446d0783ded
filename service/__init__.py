"""The reward service: HTTP in, scores out."""
