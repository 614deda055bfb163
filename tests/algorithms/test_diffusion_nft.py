"""DiffusionNFT: its loss and gradient by hand, its optimum against a fixed old policy, and where it comes to rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward_problems import (
    ELEMENTS,
    GROUP,
    TOLERANCE,
    Known,
    Movable,
    draw,
    pipeline,
    prompts,
    tilted_shift,
    trained,
    variance,
)
from problems import MelReward

from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.algorithms.diffusion_nft import DiffusionNFT, nft_loss, squared_error
from rlhf_mel.algorithms.families.forward_process import LaggedSamples, collect_samples
from rlhf_mel.flow.ema import MovingAverage

PLAIN: dict[str, Any] = dict(adaptive_weighting=False)


def test_the_loss_by_hand() -> None:
    """v_old = 1, v = 3, b = 1/2: v+ = 2 and v- = 0; u = 4, 1, 0; A = 1 of c = 4: p = 5/8.

    |v+ - u|^2 = (4 + 1 + 4) / 3, |v- - u|^2 = (16 + 1 + 0) / 3; c / b = 8.
    """
    one = draw([3.0, 3.0, 3.0], [4.0, 1.0, 0.0], old=[1.0, 1.0, 1.0], advantage=1.0)
    loss = nft_loss(one, strength=0.5, advantage_clip=4.0, adaptive=False)
    assert loss.item() == pytest.approx(8 * (5 / 8 * 3 + 3 / 8 * 17 / 3))


def test_adaptive_weighting_by_hand() -> None:
    """v - u = -2, 1, 3 at t = 1/4: the predicted mel is off by 3/4 of it; its square over its mean size 3/4 * 2."""
    one = draw([0.0, 3.0, 3.0], [2.0, 2.0, 0.0], t=0.25)
    want = (9 / 16) * (14 / 3) / (3 / 4 * 2)
    assert squared_error(one, one.velocity, adaptive=True).item() == pytest.approx(want)
    exact = draw([2.0], [2.0])
    assert squared_error(exact, exact.velocity, adaptive=True).item() == 0, "and not 0 / 0"


def test_the_whole_loss_by_hand() -> None:
    """Three rollouts of one number, u = 2, 1, 5, of one group: r = 0, 1, 2, A = -1, 0, 1 of c = 2: p = 1/4, 1/2, 3/4.

    v_old = 0, 2, 2 and v = 2, 2, 6, b = 1/2: v+ = 1, 2, 4 and v- = -1, 2, 0; (v+ - u)^2 = 1, 1, 1 and
    (v- - u)^2 = 9, 1, 25; c / b = 4. Each: 4 (1/4 + 27/4) = 28, 4 (1/2 + 1/2) = 4, 4 (3/4 + 25/4) = 28; their mean 20.
    From the anchor 2, 0, 5: (0 + 4 + 1) / 3, times beta = 0.3: 0.5.
    """

    def score(completions: list, **columns: object) -> list[float]:
        return [0.0, 1.0, 2.0]

    config = DiffusionNFT.Config(
        strength=0.5, advantage_clip=2.0, adaptive_weighting=False, num_noise_samples=2, scale_rewards="none"
    )
    algorithm, policy, generator = DiffusionNFT(config, beta=0.3), Known(), torch.Generator().manual_seed(0)
    policy.become(2.0, 0.0, 5.0)
    parts = pipeline(policy, score)
    policy.become(2.0, 1.0, 5.0)
    samples = collect_samples(parts, prompts(3, 3, 1), generator, config)
    policy.become(0.0, 2.0, 2.0)
    collected = LaggedSamples(samples=samples, old=MovingAverage(policy))
    policy.become(2.0, 2.0, 6.0)
    loss, _ = algorithm.loss(parts, collected, generator)
    assert loss.item() == pytest.approx(20.5)


@pytest.mark.parametrize("strength", [1.0, 0.1])
def test_at_the_old_policy_the_gradient_is_the_advantage(strength: float) -> None:
    """2 A (v_old - u) / 3 an element, whatever b and c; adaptive: times (1 - t) / mean |v_old - u|."""
    for adaptive, factor in ((False, 1.0), (True, 0.75 / 2)):
        one = draw([0.0, 3.0, 3.0], [2.0, 2.0, 0.0], old=[0.0, 3.0, 3.0], advantage=-1.5, t=0.25)
        one.velocity.requires_grad_()
        nft_loss(one, strength=strength, advantage_clip=5.0, adaptive=adaptive).backward()
        want = torch.tensor([-2.0, 1.0, 3.0]) * 2 * -1.5 / 3 * factor
        torch.testing.assert_close(one.velocity.grad.flatten(), want, rtol=1e-4, atol=1e-6)


def test_away_from_the_old_policy_it_is_held_by_c_b() -> None:
    """Half the gradient an element: A (v_old - u) + c b (v - v_old) = 1 (1 - 4) + 4/2 (3 - 1) = 1."""
    one = draw([3.0], [4.0], old=[1.0], advantage=1.0)
    one.velocity.requires_grad_()
    nft_loss(one, strength=0.5, advantage_clip=4.0, adaptive=False).backward()
    assert one.velocity.grad.item() == pytest.approx(2.0)


def test_the_optimum_against_a_fixed_old_policy() -> None:
    """v_old + E[A (u - v_old)] / (c b): theta_old + D^2 / (c b), one collection after another is a step of it."""
    clip, strength = 12.0, 0.5
    options: dict[str, Any] = dict(strength=strength, advantage_clip=clip, scale_rewards="none", num_noise_samples=2)
    algorithm = load_algorithm("diffusion_nft", {**options, **PLAIN})
    policy = Movable(0.1)
    parts = pipeline(policy, anchored=False)
    with torch.no_grad():
        collected = algorithm.collect(parts, prompts(8192), torch.Generator().manual_seed(0))
    assert collected.samples.advantages.abs().max() < clip

    def gradient_at(theta: float) -> float:
        policy.theta.data.fill_(theta)
        loss, _ = algorithm.loss(parts, collected, torch.Generator().manual_seed(1))
        return float(torch.autograd.grad(loss, policy.theta)[0])

    start, other = gradient_at(0.1), gradient_at(0.6)  # a parabola in theta: Newton is there after one step
    optimum = 0.1 - start * 0.5 / (other - start)
    want = 0.1 + (1 - 1 / GROUP) * variance() / (clip * strength)
    assert optimum - 0.1 == pytest.approx(want - 0.1, rel=0.08)  # sqrt(2 / 8192) and the draws, 3 each


def test_it_reaches_the_tilted_mean() -> None:
    """The old policy follows, so that only the anchor decides; each batch is used twice."""
    beta = 2.0
    theta = trained(
        "diffusion_nft", reward=MelReward(), beta=beta, strength=1.0, advantage_clip=10.0, reuse=2, rate=0.05, **PLAIN
    )
    assert theta == pytest.approx(tilted_shift(1.0, beta), rel=1.5 * TOLERANCE)


def test_it_reaches_the_tilted_mean_in_units_of_the_deviation() -> None:
    """Advantages over the batch's deviation, D sqrt(elements), and clipped at 5: r has the factor 1 / (D sqrt(n))."""
    beta = 1.0
    options: dict[str, Any] = dict(scale_rewards="batch", advantage_clip=5.0, strength=0.5, **PLAIN)
    theta = trained("diffusion_nft", reward=MelReward(), beta=beta, **options)
    assert theta == pytest.approx(tilted_shift((ELEMENTS * variance()) ** -0.5, beta), rel=TOLERANCE)


@pytest.mark.parametrize("adaptive", [False, True])
def test_without_an_anchor_it_reaches_the_maximum(adaptive: bool) -> None:
    options: dict[str, Any] = dict(scale_rewards="batch", advantage_clip=5.0, adaptive_weighting=adaptive)
    theta = trained("diffusion_nft", reward=MelReward(target=0.2), updates=60, rate=0.1, **options)
    assert theta == pytest.approx(0.2 - Movable.flow.mean, abs=0.03)


def test_rollouts_are_the_old_policys() -> None:
    """After an update by 1 the decay is 1/4: the old policy is at 3/4, and speaks from there."""
    policy = Movable(0.0)
    parts = pipeline(policy, anchored=False)
    algorithm = load_algorithm("diffusion_nft", {"old_decay_rate": 0.25})
    algorithm.collect(parts, prompts(4, 2), torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.theta += 1.0
    algorithm.on_update(parts)
    collected: Any = algorithm.collect(parts, prompts(4, 2), torch.Generator().manual_seed(0))
    assert policy.theta.item() == 1 and collected.old.state_dict()["theta"].item() == 0.75
    still = load_algorithm("diffusion_nft").collect(
        pipeline(Movable(0.75)), prompts(4, 2), torch.Generator().manual_seed(0)
    )
    assert torch.equal(collected.samples.rollouts.mel, still.samples.rollouts.mel)
    _, metrics = algorithm.loss(parts, collected, torch.Generator().manual_seed(1))
    assert (metrics["old_deviation"] > 0).all()
    resumed: Any = load_algorithm("diffusion_nft", {"old_decay_rate": 0.25})
    resumed.load_state_dict(algorithm.state_dict())
    again = resumed.collect(parts, prompts(4, 2), torch.Generator().manual_seed(0))
    assert torch.equal(again.samples.rollouts.mel, collected.samples.rollouts.mel)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength of diffusion_nft: expected a number above 0"),
        ({"old_decay_max": 1.0}, r"old_decay_max of diffusion_nft: expected a number of \[0, 1\)"),
        ({"advantage_clip": float("inf")}, "advantage_clip of diffusion_nft: expected a finite number"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_algorithm("diffusion_nft", options)
