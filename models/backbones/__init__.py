"""Towers that several reward models share."""
