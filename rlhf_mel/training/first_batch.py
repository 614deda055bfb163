"""What the first batch of a run tells: ratios of 1, rewards that differ, finite values."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_mel.algorithms.base import Algorithm
from rlhf_mel.metrics import Metrics
from rlhf_mel.training.callbacks import warn_at_start

RATIO_TOLERANCE = 1e-3
"""How far from 1 the first ratio may be where the algorithm clips nothing, or later than there."""


EQUAL_REWARDS = 1e-6
"""Rewards that differ by less than this share of their size are equal: the rest is rounding."""


def first_ratio_limit(algorithm: Algorithm) -> float:
    """How far from 1 the first ratio may be: beyond the clip range, updates are cut that have not even begun."""
    clip = algorithm.clip
    return RATIO_TOLERANCE if clip is None else min(clip.low, clip.high, RATIO_TOLERANCE)


def all_equal(rewards: Tensor) -> bool:
    """Whether finite rewards [B] are one number, up to rounding."""
    return len(rewards) < 2 or bool(rewards.max() - rewards.min() <= EQUAL_REWARDS * rewards.abs().max())


def check_first_batch(algorithm: Algorithm, metrics: Metrics) -> None:
    """Warn of a run whose first batch, by what is logged of it anyway, teaches nothing; the doctor measures why."""
    rewards = metrics.get("reward", torch.zeros(0))
    finite = rewards[rewards.isfinite()]
    clipped, ratio_error = metrics.get("clip_ratio/region_mean"), metrics.get("ratio_error")
    flat, dropped = metrics.get("frac_reward_zero_std"), metrics.get("dropped_rollouts")
    off = ratio_error is not None and not bool((ratio_error <= first_ratio_limit(algorithm)).all())
    faults = []
    if off or (clipped is not None and bool((clipped > 0).any())):
        largest = "" if ratio_error is None else f" (off by {float(ratio_error.max()):.2g})"
        faults.append(f"expected ratio 1, got others{largest}: the replay is not the policy that rolled out")
    if dropped is not None and dropped.numel() and bool(dropped.all()):
        faults.append("expected finite rewards, got none")
    elif flat is not None and float(flat) == 1 and not algorithm.reward_gradient:
        faults.append("expected rewards that differ within a group, got equal ones")
    elif len(finite) > 1 and all_equal(finite) and not algorithm.reward_gradient:
        faults.append("expected rewards that differ, got equal ones")
    for fault in faults:
        warn_at_start(f"{len(rewards)} fresh rollouts: {fault}")
