"""Reward models: torch in, torch out. This package imports no HTTP."""
