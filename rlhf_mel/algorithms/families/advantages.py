"""Advantages: how much better a rollout is than others, from its rewards.

    A_i = (r_i - mean_group(r)) / (std(r) + 1e-4),      std of the group, of the batch, or no division

A group is the rollouts with one group id, never those with one text: two voices may say the same. A reward that is not
finite counts for nothing: it is left out of every mean and deviation, and its own advantage is 0 (so mask such rows in
a loss that is not proportional to the advantage). In a group whose rewards are all equal every advantage is exactly 0.
The mean counts the rollout itself, which takes 1 / G off the gradient of the reward in a group of G, in no other way.

References: Shao et al. 2024, DeepSeekMath (GRPO), arXiv 2402.03300; scale "none": Liu et al. 2025, Dr. GRPO, arXiv
2503.20783; "normalize_then_sum": GDPO, as in TRL's GRPOTrainer, whose epsilon and standard deviation (n - 1) these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_mel.types import Scores

SCALE_REWARDS = ("group", "batch", "none")


AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


EPSILON = 1e-4
"""Keeps the division finite; TRL's and flow_grpo's."""


def check_scaling(
    name: str, scale_rewards: str, multi_objective_aggregation: str, *, known: Sequence[str] = SCALE_REWARDS
) -> None:
    """Raise a ValueError unless both are known; `name` is the algorithm's, `known` its ways to scale."""
    for option, value, expected in (
        ("scale_rewards", scale_rewards, known),
        ("multi_objective_aggregation", multi_objective_aggregation, AGGREGATIONS),
    ):
        if value not in expected:
            raise ValueError(f"{option} of {name}: expected one of {list(expected)}, got {value!r}")


def score_advantages(
    scores: Scores,
    weights: Mapping[str, float],
    group_ids: Int[Tensor, " b"] | None,
    *,
    scale_rewards: str = "group",
    multi_objective_aggregation: str = "sum_then_normalize",
) -> Float[Tensor, " b"]:
    """Advantages, float32, of what the reward models said.

    Args:
        weights: one a name of `scores.breakdown`.
        group_ids: None: every row is its own group, and every advantage 0.
        multi_objective_aggregation: "sum_then_normalize" takes the weighted sum as the reward. "normalize_then_sum"
            takes for it the sum of weight times each reward's own deviation from its group, in standard deviations, so
            that the scale of a reward does not decide what counts; the sum is normalised over the batch (in TRL
            `scale_rewards` has then no effect; the same here).
    """
    total = scores.total.detach().float()
    if group_ids is None:
        group_ids = torch.arange(len(total), device=total.device)
    if multi_objective_aggregation == "sum_then_normalize":
        return group_advantages(total, group_ids, scale_rewards=scale_rewards)
    summed = torch.zeros_like(total)
    for name, weight in weights.items():
        if weight != 0:
            summed += weight * group_advantages(scores.breakdown[name].detach().float(), group_ids)
    return batch_advantages(summed.where(total.isfinite(), torch.nan))


def group_advantages(
    rewards: Float[Tensor, " b"], group_ids: Int[Tensor, " b"], *, scale_rewards: str = "group"
) -> Float[Tensor, " b"]:
    """Advantages of `rewards` over the mean of their group."""
    centred = torch.zeros_like(rewards)
    scale = torch.ones_like(rewards)
    for group in torch.unique(group_ids):
        members = (group_ids == group) & rewards.isfinite()
        compared = rewards[members]
        if len(compared) > 1 and not bool((compared == compared[0]).all()):
            centred[members] = compared - compared.mean()
            if scale_rewards == "group":
                scale[members] = compared.std() + EPSILON
    if scale_rewards == "batch":
        finite = rewards[rewards.isfinite()]
        scale = finite.std() + EPSILON if len(finite) > 1 else scale
    return centred / scale


def batch_advantages(rewards: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Advantages of `rewards` over all of them: one group."""
    return group_advantages(rewards, torch.zeros(len(rewards), dtype=torch.long, device=rewards.device))
