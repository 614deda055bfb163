"""AWM: log-probabilities, ratios and a whole loss by hand, and where it comes to rest for each weight of time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward_problems import TOLERANCE, Known, Movable, draw, pipeline, prompts, tilted_shift, time_mean, trained
from problems import MelReward
from torch import Tensor

from rlhf_mel.algorithms.awm import AWM, RatioSamples, matching_log_prob
from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.algorithms.families.forward_process import collect_samples
from rlhf_mel.flow.ema import MovingAverage


def test_log_probabilities_by_hand() -> None:
    error, t = torch.tensor([0.0, 1.0, 16.0]), torch.tensor([0.0, 0.25, 0.5])
    assert matching_log_prob(error, t, "uniform").tolist() == [0, -1, -16]
    assert matching_log_prob(error, t, "noise").tolist() == [0, -0.75, -8]
    # (1 - t) (m^(1/4) - (1e-10)^(1/4)) / (1/4), and (1e-10)^(1/4) = 0.0031623
    want = torch.tensor([0.0, -0.75 * 4 * (1 - 0.0031623), -0.5 * 4 * (2 - 0.0031623)])
    torch.testing.assert_close(matching_log_prob(error, t, "ghuber"), want, rtol=1e-5, atol=1e-6)


def values(algorithm: AWM, advantage: float, old: float | None) -> tuple[dict[str, Tensor], Tensor]:
    """Of v = 1, 2 and u = 0, 2: log p = -1/2; and the gradient by v."""
    one = draw([1.0, 2.0], [0.0, 2.0], advantage=advantage)
    one.velocity.requires_grad_()
    old_log_probs = None if old is None else torch.tensor([[old]])
    got = algorithm._values(one, old_log_probs=old_log_probs, log_probs=torch.zeros(1, 1))
    got["surrogate"].sum().backward()
    assert one.velocity.grad is not None
    return got, one.velocity.grad.flatten()


def test_the_surrogate_by_hand() -> None:
    """d log p / dv = -2 (v - u) / 2 = -1, 0, so that of -A ratio is A ratio times 1, 0; or 0 where it is cut off."""
    algorithm = AWM(AWM.Config(epsilon=0.5, num_noise_samples=1))
    first, gradient = values(algorithm, 2.0, None)
    assert first["surrogate"].item() == -2 and gradient.tolist() == [2, 0]
    ratio = torch.tensor(-0.5 + 0.9).exp().item()  # e^0.4 = 1.49 < 1.5
    later, gradient = values(algorithm, 2.0, -0.9)
    assert later["surrogate"].item() == pytest.approx(-2 * ratio) and gradient[0].item() == pytest.approx(2 * ratio)
    assert later["clip_ratio/region_mean"].item() == 0
    cut, gradient = values(algorithm, 2.0, -1.0)  # e^0.5 = 1.65
    assert cut["surrogate"].item() == pytest.approx(-3.0) and gradient.tolist() == [0, 0]
    assert cut["clip_ratio/high_mean"].item() == 1
    low, gradient = values(algorithm, -1.0, 0.5)  # e^-1 = 0.37
    assert low["surrogate"].item() == pytest.approx(0.5) and gradient.tolist() == [0, 0]
    assert low["clip_ratio/low_mean"].item() == 1


def test_the_whole_loss_by_hand() -> None:
    """Three rollouts of one number, u = 1, 2, 4, of one group: r = 0, 0, 3, A = -1, -1, 2.

    First update, v = 2, 2, 3: log p_old = -(v - u)^2 = -1, 0, -1. The next, v = 1, 3, 4.5: log p = 0, -1, -0.25.
    Ratios e, e^-1 and e^0.75, against [0.5, 1.5]: max(e, 1.5), max(e^-1, 0.5), max(-2 e^0.75, -3) are e, 0.5, -3.
    From the anchor 0, 1, 1.5: (1 + 4 + 9) / 3, times beta = 0.3: 1.4. From the average 2, 3, 2.5: (1 + 0 + 4) / 3,
    times ema_beta = 0.6: 1.
    """

    def score(completions: list, **columns: object) -> list[float]:
        return [0.0, 0.0, 3.0]

    config = AWM.Config(num_noise_samples=2, epsilon=0.5, ema_beta=0.6, scale_rewards="none")
    algorithm, policy, generator = AWM(config, beta=0.3), Known(), torch.Generator().manual_seed(0)
    policy.become(0.0, 1.0, 1.5)
    parts = pipeline(policy, score)
    policy.become(1.0, 2.0, 4.0)
    samples = collect_samples(parts, prompts(3, 3, 1), generator, config)
    policy.become(2.0, 3.0, 2.5)
    collected = RatioSamples(samples=samples, noise_seed=0, average=MovingAverage(policy))
    policy.become(2.0, 2.0, 3.0)
    algorithm.loss(parts, collected, generator)
    policy.become(1.0, 3.0, 4.5)
    loss, _ = algorithm.loss(parts, collected, generator)
    assert loss.item() == pytest.approx((2.7182818 + 0.5 - 3) / 3 + 1.4 + 1.0)


def test_later_updates_compare_at_the_times_and_noise_of_the_first() -> None:
    """Ratio 1 and loss -mean A = 0 first, whatever the generator of the update; then exp(old - new) of each draw."""
    policy = Movable()
    parts = pipeline(policy, anchored=False)
    algorithm = AWM(AWM.Config(num_noise_samples=2, ema_beta=0.0, epsilon=10.0, scale_rewards="none"))
    collected = algorithm.collect(parts, prompts(4, 2), torch.Generator().manual_seed(0))
    first, _ = algorithm.loss(parts, collected, torch.Generator().manual_seed(1))
    assert first.item() == pytest.approx(0, abs=1e-6) and collected.old_log_probs is not None
    old = collected.old_log_probs.clone()
    again, _ = algorithm.loss(parts, collected, torch.Generator().manual_seed(2))
    assert torch.equal(again, first)
    with torch.no_grad():
        policy.theta += 0.5
    later, _ = algorithm.loss(parts, collected, torch.Generator().manual_seed(3))
    assert torch.equal(collected.old_log_probs, old)
    collected.old_log_probs = None
    algorithm.loss(parts, collected, torch.Generator().manual_seed(4))
    ratio = (collected.old_log_probs - old).exp()
    assert (ratio - 1).abs().max() > 0.1
    want = -(collected.samples.advantages * ratio).mean()
    torch.testing.assert_close(later, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("weighting", "power"), [("uniform", 1.0), ("noise", 0.0)])
def test_it_reaches_the_tilted_mean(weighting: str, power: float) -> None:
    """theta E[g^2] beta = c D^2 E[w g^2]: weights of time, which the anchor has not, change it; their density does not.

    The average of the weights is on, and does not move the point of rest.
    """
    beta = 2.0
    options: dict[str, Any] = dict(weighting=weighting, time_power=power, ema_beta=0.5)
    theta = trained("awm", reward=MelReward(), beta=beta, **options)
    share = time_mean(power, 1.0) / time_mean(power) if weighting == "noise" else 1.0
    assert share == 1 or 0.3 < share < 0.7
    assert theta == pytest.approx(share * tilted_shift(1.0, beta), rel=TOLERANCE)


def test_with_rollouts_used_again_it_reaches_it_too() -> None:
    """Four updates a batch, twice the tolerance: a quarter of the rollouts."""
    beta = 2.0
    theta = trained("awm", reward=MelReward(), beta=beta, reuse=4, rate=0.03, ema_beta=0.0, epsilon=0.2)
    assert theta == pytest.approx(tilted_shift(1.0, beta), rel=2 * TOLERANCE)


@pytest.mark.parametrize("weighting", ["uniform", "ghuber"])
def test_without_an_anchor_it_reaches_the_maximum(weighting: str) -> None:
    options: dict[str, Any] = dict(weighting=weighting, scale_rewards="batch", advantage_clip=5.0, ema_beta=0.5)
    theta = trained("awm", reward=MelReward(target=0.2), updates=60, **options)
    assert theta == pytest.approx(0.2 - Movable.flow.mean, abs=0.03)


def test_the_average_holds_the_policy_back() -> None:
    """Its gradient by theta: 2 ema_beta (theta - theta_ema) E[g^2], here at 0.5 from it, with equal rewards."""

    def same(completions: list, **columns: object) -> list[float]:
        return [0.3] * len(completions)

    policy = Movable()
    parts = pipeline(policy, same, anchored=False)
    algorithm = load_algorithm("awm", {"ema_beta": 3.0, "num_noise_samples": 8})
    collected = algorithm.collect(parts, prompts(512), torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.theta += 0.5
    loss, metrics = algorithm.loss(parts, collected, torch.Generator())
    loss.backward()
    assert policy.theta.grad.item() == pytest.approx(2 * 3 * 0.5 * time_mean(0.0), rel=0.02)
    assert metrics["ema_deviation"].mean().item() == pytest.approx(0.25 * time_mean(0.0), rel=0.02)


def test_options_that_cannot_be_meant() -> None:
    for options, message in (
        ({"weighting": "huber"}, r"weighting of awm: expected one of \['uniform', 'noise', 'ghuber'\], got 'huber'"),
        ({"epsilon": 0.0}, "epsilon of awm: expected a number above 0"),
        ({"ema_beta": -1.0}, "ema_beta of awm: expected a number of at least 0"),
        ({"ema_decay_max": 1.0}, r"ema_decay_max of awm: expected a number of \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_algorithm("awm", options)
