"""Rewards: what one is, its options, loading by name, several as one score."""
