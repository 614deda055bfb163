"""Rewards by name, a file each: `--reward_models NAME` is the attribute `reward_model` of NAME.py."""
