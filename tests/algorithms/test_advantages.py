"""Advantages against computations by hand, and against TRL's own formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_mel.algorithms.families.advantages import batch_advantages, check_scaling, group_advantages, score_advantages
from rlhf_mel.types import Scores

NAN = float("nan")


def close(got: Tensor, want: list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-6)


def test_three_rewards_by_hand() -> None:
    # Mean 2, deviations -1, 0, 1: standard deviation 1, so 1 / (1 + 1e-4).
    rewards, one_group = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 7, 7])
    close(group_advantages(rewards, one_group), [-1 / 1.0001, 0.0, 1 / 1.0001])
    close(group_advantages(rewards, one_group, scale_rewards="none"), [-1.0, 0.0, 1.0])
    close(batch_advantages(rewards), [-1 / 1.0001, 0.0, 1 / 1.0001])


def test_groups_are_those_of_the_ids_in_any_order() -> None:
    # Group 3: 0 and 4, mean 2, deviation sqrt(8); group 1: 10 and 12, mean 11, deviation sqrt(2).
    rewards, groups = torch.tensor([0.0, 10.0, 4.0, 12.0]), torch.tensor([3, 1, 3, 1])
    far, near = 2 / (math.sqrt(8) + 1e-4), 1 / (math.sqrt(2) + 1e-4)
    close(group_advantages(rewards, groups), [-far, -near, far, near])
    # Batch: mean 6.5, squares 42.25 + 12.25 + 6.25 + 30.25 = 91, over 3.
    scale = math.sqrt(91 / 3) + 1e-4
    close(group_advantages(rewards, groups, scale_rewards="batch"), [-2 / scale, -1 / scale, 2 / scale, 1 / scale])


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_a_missing_reward_counts_for_nothing(scale_rewards: str) -> None:
    rewards, groups = torch.tensor([1.0, NAN, 3.0, 5.0, math.inf]), torch.tensor([0, 0, 0, 1, 1])
    kept = torch.tensor([0, 2, 3])
    got = group_advantages(rewards, groups, scale_rewards=scale_rewards)
    want = group_advantages(rewards[kept], groups[kept], scale_rewards=scale_rewards)
    assert torch.equal(got[kept], want) and got[1] == got[4] == 0
    assert got[0] < 0 < got[2] and got[3] == 0, "alone in its group: nothing to be better than"


def test_equal_rewards_have_advantage_exactly_zero() -> None:
    # In float32 the mean of seven 2.1 is not 2.1, and a deviation of 3e-7 would make advantages of the rounding.
    rewards = torch.tensor([2.1] * 7 + [1.0, 2.0])
    assert rewards[:7].mean() != rewards[0]
    assert group_advantages(rewards, torch.tensor([0] * 7 + [1, 1]))[:7].tolist() == [0.0] * 7


def trl_normalize_then_sum(per_reward: Tensor, weights: Tensor, num_generations: int) -> Tensor:
    """GRPOTrainer's GDPO branch (trl 1.16) for rewards [B, N] without gaps."""
    grouped = per_reward.view(-1, num_generations, per_reward.shape[1])
    each = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    rewards = (each.view_as(per_reward) * weights).sum(1)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def test_several_rewards_as_in_trl() -> None:
    generator = torch.Generator().manual_seed(0)
    per_reward = torch.randn(6, 2, generator=generator) * torch.tensor([1.0, 100.0])
    weights = {"mos": 0.7, "wer": 2.0}
    scores = Scores(per_reward @ torch.tensor([0.7, 2.0]), dict(zip(weights, per_reward.unbind(1), strict=True)))
    groups = torch.tensor([4, 4, 4, 2, 2, 2])
    together = score_advantages(scores, weights, groups)
    assert torch.equal(together, group_advantages(scores.total, groups))
    apart = score_advantages(scores, weights, groups, multi_objective_aggregation="normalize_then_sum")
    want = trl_normalize_then_sum(per_reward, torch.tensor([0.7, 2.0]), 3)
    torch.testing.assert_close(apart, want, rtol=1e-5, atol=1e-6)
    assert (together - apart).abs().max() > 0.1


def test_with_several_rewards_a_row_may_lack_one_or_all() -> None:
    mos, wer = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([NAN, 1.0, 0.0, 5.0])
    weights, groups = {"mos": 1.0, "wer": 1.0}, torch.tensor([0, 0, 0, 0])
    skipped = Scores(torch.tensor([1.0, 3.0, 3.0, NAN]), {"mos": mos, "wer": wer})
    got = score_advantages(skipped, weights, groups, multi_objective_aggregation="normalize_then_sum")
    # mos: mean 2.5, deviations -1.5 -0.5 0.5 1.5, std sqrt(5/3); wer without row 0: mean 2, -1 -2 3, std sqrt(7).
    a, b = math.sqrt(5 / 3) + 1e-4, math.sqrt(7) + 1e-4
    sums = torch.tensor([-1.5 / a, -0.5 / a - 1 / b, 0.5 / a - 2 / b])
    close(got, [*((sums - sums.mean()) / (sums.std() + 1e-4)).tolist(), 0.0])


def test_without_groups_there_is_nothing_to_compare() -> None:
    scores = Scores(torch.tensor([1.0, 2.0]), {"mos": torch.tensor([1.0, 2.0])})
    assert score_advantages(scores, {"mos": 1.0}, None).tolist() == [0.0, 0.0]


def test_unknown_scalings_are_refused() -> None:
    check_scaling("x", "batch", "normalize_then_sum")
    with pytest.raises(
        ValueError, match=r"scale_rewards of x: expected one of \['group', 'batch', 'none'\], got 'std'"
    ):
        check_scaling("x", "std", "sum_then_normalize")
    with pytest.raises(ValueError, match="multi_objective_aggregation of x"):
        check_scaling("x", "none", "sum")
