"""RAM: its target by hand, and the tilted mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward_problems import ELEMENTS, TOLERANCE, Movable, draw, pipeline, prompts, tilted_shift, trained, variance
from problems import MelReward

from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.algorithms.ram import RAM, ram_target


def test_the_target_by_hand() -> None:
    """v_ref + A / beta (u - v_old) with A / beta = 4: 1 + 4 (2 - 1), 0 + 4 (0 - 1), 2 + 4 (5 - 4)."""
    one = draw([0.0] * 3, [2.0, 0.0, 5.0], reference=[1.0, 0.0, 2.0], old=[1.0, 1.0, 4.0], advantage=2.0)
    assert ram_target(one, beta=0.5).flatten().tolist() == [5.0, -4.0, 6.0]


def test_the_gradient_by_hand() -> None:
    """beta d|v - target|^2 / dv / 2 = (beta (v - v_ref) - A (u - v_old)) / 3: none through target or old."""
    one = draw([3.0, 0.0, 2.0], [2.0, 0.0, 5.0], reference=[1.0, 0.0, 2.0], old=[1.0, 1.0, 4.0], advantage=2.0)
    one.velocity.requires_grad_()
    (0.5 * RAM(beta=0.5)._values(one)["ram_loss"]).sum().backward()
    want = torch.tensor([0.5 * 2 - 2 * 1, 0.5 * 0 + 2 * 1, 0.5 * 0 - 2 * 1]) * 2 / 3
    torch.testing.assert_close(one.velocity.grad.flatten(), want)


@pytest.mark.parametrize(("lag", "power"), [(0.0, 0.0), (0.9, 1.0)])
def test_it_reaches_the_tilted_mean(lag: float, power: float) -> None:
    """On-policy as in equation 17, with a policy that lags behind, and for either density of times."""
    beta = 2.0
    options: dict[str, Any] = dict(old_decay_max=lag, time_power=power)
    rate = 0.1 if lag == 0 else 0.05
    theta = trained("ram", reward=MelReward(), beta=beta, rate=rate, **options)
    assert theta == pytest.approx(tilted_shift(1.0, beta), rel=TOLERANCE)


def test_it_reaches_the_tilted_mean_of_a_quadratic_reward() -> None:
    """p_ref exp(-c (x - a)^2 / beta) has its mean at m + k (a - m) / (1 + k), k = 2 c D^2 / beta; c a group's 15/16."""
    beta, a = 2.0, 0.2
    theta = trained("ram", reward=MelReward(target=a), beta=beta, old_decay_max=0.0)
    k = 2 * tilted_shift(1.0, beta)
    assert theta == pytest.approx(k * (a - Movable.flow.mean) / (1 + k), rel=1.5 * TOLERANCE)


def test_it_reaches_the_tilted_mean_in_units_of_the_deviation() -> None:
    """The lag of the defaults and four updates a batch; twice the tolerance: a quarter of the rollouts."""
    beta = 1.0
    options: dict[str, Any] = dict(scale_rewards="batch", reuse=4, rate=0.05)
    theta = trained("ram", reward=MelReward(), beta=beta, **options)
    assert theta == pytest.approx(tilted_shift((ELEMENTS * variance()) ** -0.5, beta), rel=2 * TOLERANCE)


def test_without_a_preference_the_loss_is_the_anchor() -> None:
    """Equal rewards: beta mean |v_theta - v_ref|^2, of the size that `beta` has in every algorithm."""

    def same(completions: list, **columns: object) -> list[float]:
        return [0.3] * len(completions)

    policy = Movable(0.0)
    parts = pipeline(policy, same)
    algorithm = load_algorithm("ram", beta=0.25)
    collected = algorithm.collect(parts, prompts(4, 2), torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.theta += 1.0
    loss, metrics = algorithm.loss(parts, collected, torch.Generator().manual_seed(1))
    assert metrics["anchor"].mean() > 0.5
    assert loss.item() == pytest.approx(0.25 * metrics["anchor"].mean().item())


def test_rollouts_are_the_lagged_policys_and_so_is_the_baseline() -> None:
    policy = Movable(0.0)
    parts = pipeline(policy)
    algorithm: Any = load_algorithm("ram", {"old_decay_rate": 0.25}, beta=0.5)
    algorithm.check(parts)
    algorithm.collect(parts, prompts(4, 2), torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.theta += 1.0
    algorithm.on_update(parts)
    collected = algorithm.collect(parts, prompts(4, 2), torch.Generator().manual_seed(0))
    still: Any = load_algorithm("ram", beta=0.5).collect(
        pipeline(Movable(0.75)), prompts(4, 2), torch.Generator().manual_seed(0)
    )
    assert torch.equal(collected.samples.rollouts.mel, still.samples.rollouts.mel)
    _, metrics = algorithm.loss(parts, collected, torch.Generator().manual_seed(1))
    # theta is 1/4 from the old policy and 1 from the reference: (1/4)^2 g^2 and g^2 at the same points
    torch.testing.assert_close(metrics["old_deviation"] * 16, metrics["anchor"], rtol=1e-4, atol=1e-6)


def test_without_beta_there_is_no_such_problem() -> None:
    with pytest.raises(ValueError, match=r"regresses the reference's velocity: expected beta above 0, got 0; 0\.01 is"):
        load_algorithm("ram", beta=0.0).check(pipeline(Movable(), anchored=False))
    with pytest.raises(ValueError, match=r"old_decay_max of ram: expected a number of \[0, 1\)"):
        load_algorithm("ram", {"old_decay_max": 1.0})
