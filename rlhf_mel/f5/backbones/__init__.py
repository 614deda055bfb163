"""Backbones: one module each, found by its name; what they share begins with an underscore."""
