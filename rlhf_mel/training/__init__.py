"""A run: its options, the trainer, its callbacks, and the folder that it leaves."""
