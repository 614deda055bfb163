"""ORW-CFM-W2: weights and a whole loss by hand, and where it comes to rest with and without its anchor."""

from __future__ import annotations

import pytest
import torch
from forward_problems import ELEMENTS, GROUP, TOLERANCE, Known, Movable, pipeline, prompts, trained, variance
from problems import MelReward

from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.algorithms.orw_cfm import effective_share, reward_weights


def test_weights_by_hand() -> None:
    """exp(ln 2 * A) = 1, 2, 4 over their mean 7/3; the other group: 1 and a rollout without a reward."""
    advantages = torch.tensor([0.0, 1.0, 2.0, 5.0, 0.0])
    groups, dropped = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([False, False, False, False, True])
    weights = reward_weights(advantages, groups, dropped, tau=0.6931472)
    torch.testing.assert_close(weights, torch.tensor([3 / 7, 6 / 7, 12 / 7, 1.0, 0.0]))
    huge = reward_weights(1e4 * advantages, groups, dropped, tau=1.0)
    assert huge.tolist() == [0.0, 0.0, 3.0, 1.0, 0.0], "the best one alone, and no overflow"


def test_the_effective_share_by_hand() -> None:
    assert effective_share(torch.tensor([1.0, 1.0])).item() == 1
    assert effective_share(torch.tensor([2.0, 0.0])).item() == 0.5
    assert effective_share(torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx(36 / (3 * 14))


def test_the_whole_loss_by_hand() -> None:
    """Three rollouts of one number, u = 1, 2, 4, of one group: r = 0, 1, 2, A = -1, 0, 1.

    exp(ln 2 * A) = 1/2, 1, 2 over their mean 7/6 are w = 3/7, 6/7, 12/7. At v = 2, 4, 3 the squares (v - u)^2 are
    1, 4, 1: (3/7 + 24/7 + 12/7) / 3 = 13/7. From the anchor 2, 1, 2: (0 + 9 + 1) / 3, times beta = 0.3: 1.
    """

    def score(completions: list, **columns: object) -> list[float]:
        return [0.0, 1.0, 2.0]

    options = {"tau": 0.6931472, "num_noise_samples": 2, "scale_rewards": "none"}
    algorithm = load_algorithm("orw_cfm", options, beta=0.3)
    policy, generator = Known(), torch.Generator().manual_seed(0)
    policy.become(2.0, 1.0, 2.0)
    parts = pipeline(policy, score)
    policy.become(1.0, 2.0, 4.0)
    collected = algorithm.collect(parts, prompts(3, 3, 1), generator)
    policy.become(2.0, 4.0, 3.0)
    loss, _ = algorithm.loss(parts, collected, generator)
    assert loss.item() == pytest.approx(13 / 7 + 1.0)


def self_normalised(spread: float, group: int) -> float:
    """E[mean_i w_i z_i] / spread with w = exp(spread z) / mean, z ~ N(0, 1), in groups: 1 for infinite ones."""
    z = torch.randn(100_000, group, generator=torch.Generator().manual_seed(0))
    return ((spread * z).softmax(-1) * z).sum(-1).mean().item() / spread


@pytest.mark.parametrize(("normalize", "group"), [("group", GROUP), ("batch", 128)])
def test_it_reaches_the_tilted_mean(normalize: str, group: int) -> None:
    """tau / beta times that of exp(r): the weighted mels have mean m + tau c D^2, the anchor pulls by beta theta."""
    tau, beta = 0.2, 0.5
    theta = trained("orw_cfm", reward=MelReward(), beta=beta, tau=tau, normalize_weights=normalize)
    share = self_normalised(tau * (ELEMENTS * variance()) ** 0.5, group)
    assert share > 0.9
    assert theta == pytest.approx(share * tau * variance() / beta, rel=TOLERANCE)


def test_without_an_anchor_it_reaches_the_maximum() -> None:
    theta = trained("orw_cfm", reward=MelReward(scale=0.3, target=0.2), updates=60, rate=0.4)
    assert theta == pytest.approx(0.2 - Movable.flow.mean, abs=0.02)


def test_without_an_anchor_a_linear_reward_has_no_end() -> None:
    near, far = (trained("orw_cfm", reward=MelReward(), tau=0.2, updates=updates) for updates in (30, 60))
    assert near > 0.3 and far == pytest.approx(2 * near, rel=0.1)


def test_equal_rewards_are_plain_flow_matching() -> None:
    def same(completions: list, **columns: object) -> list[float]:
        return [0.3] * len(completions)

    parts = pipeline(Movable(), same, anchored=False)
    algorithm = load_algorithm("orw_cfm")
    collected = algorithm.collect(parts, prompts(4, 2), torch.Generator().manual_seed(0))
    loss, metrics = algorithm.loss(parts, collected, torch.Generator().manual_seed(1))
    assert loss.item() == pytest.approx(metrics["flow_matching_loss"].mean().item())
    assert metrics["effective_share"] == 1 and metrics["frac_reward_zero_std"] == 1


def test_rollouts_that_are_compared_with_nothing_are_refused() -> None:
    parts = pipeline(Movable(), anchored=False)
    with pytest.raises(ValueError, match="got 4 groups of one; raise num_generations, or normalize by 'batch'"):
        load_algorithm("orw_cfm").collect(parts, prompts(4, 1), torch.Generator())
    load_algorithm("orw_cfm", {"normalize_weights": "batch"}).collect(parts, prompts(4, 1), torch.Generator())


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"normalize_weights of orw_cfm: expected one of \['group', 'batch'\], got 'no'"
    ):
        load_algorithm("orw_cfm", {"normalize_weights": "no"})
    with pytest.raises(ValueError, match=r"tau of orw_cfm: expected a number above 0, got 0\.0"):
        load_algorithm("orw_cfm", {"tau": 0.0})
