"""Fitting reward models to preferences."""
