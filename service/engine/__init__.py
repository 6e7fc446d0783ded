"""Loaded models, their queues and their workers."""
