"""Hearing held-out prompts before and after training: measures, intervals, verdict, report."""
