"""Prompts: reading lists of them, and who sees which when."""
