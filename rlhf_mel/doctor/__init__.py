"""Checks of a run before it begins."""
