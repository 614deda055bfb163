"""Algorithms: rollouts and scores to a loss and metrics, a file each (base.py says what one is)."""
