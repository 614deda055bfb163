"""Prompts and human preferences: reading lists of them, and who sees which when."""
