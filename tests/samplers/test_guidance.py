"""Noise optimisation and step guidance: known optima, plain sampling where nothing is asked, items as alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gaussian import ELEMENTS, FLOW, GENERATED, MELS, GaussianPolicy, MelReward, Silent, prompts
from problems import tiny_policy, tiny_prompts
from torch import Tensor

from rlhf_mel.evaluation.evaluate import evaluate
from rlhf_mel.flow.noise import item_generator
from rlhf_mel.flow.policy import rollout
from rlhf_mel.pipeline import Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.samplers.noise_optimisation import NoiseOptimisation, drawn_noise, moved
from rlhf_mel.samplers.step_guidance import Guided, StepGuidance
from rlhf_mel.types import Audio, Prompts

STEPS = 4
OPTIONS: dict[str, Any] = dict(steps=STEPS, cfg_strength=0.0, sway_sampling_coef=None)
TARGET = torch.linspace(-0.3, 1.5, ELEMENTS).reshape(GENERATED, MELS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def optimisation(reward: MelReward, **options: Any) -> NoiseOptimisation:
    return NoiseOptimisation(vocoder=Silent(), rewards=Rewards([reward]), **options)


def guidance(reward: MelReward, **options: Any) -> StepGuidance:
    return StepGuidance(vocoder=Silent(), rewards=Rewards([reward]), **options)


# Noise optimisation. With exact steps x_1 = m + d x_0 in every element.


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_noise_reaches_the_optimum_of_a_quadratic(weight: float) -> None:
    """-sum (m + d x - c)^2 / 2 - w |x|^2 / 2 is greatest at x = d (c - m) / (d^2 + w).

    Each x_0 within 0.05 sqrt(D) / 60 of it, the length of the last step; x_1 within d times that.
    """
    policy = GaussianPolicy(STEPS, exact=True)
    sampler = optimisation(MelReward(target=TARGET), prior="gaussian", prior_weight=weight, updates=60, step_size=0.2)
    mel = sampler(policy, prompts(3), generator=seeded(), **OPTIONS).mel
    d = FLOW.deviation
    best = FLOW.mean + d * d * (TARGET - FLOW.mean) / (d**2 + weight)
    plain = rollout(policy, prompts(3), generator=seeded(), grad_steps=0, **OPTIONS).mel
    assert (plain - best).flatten(1).norm(dim=1).min() > 0.3
    assert (mel - best).flatten(1).norm(dim=1).max() < d * 0.2 * ELEMENTS**0.5 / 60


def test_noise_on_the_sphere_points_to_the_target_and_keeps_its_norm() -> None:
    """max of -|m + d x - c|^2 / 2 with |x| = R is x = R (c - m) / |c - m|."""
    policy = GaussianPolicy(STEPS, exact=True)
    noise, free = drawn_noise(policy, prompts(3), seeded(), cfg_strength=0.0)
    radius = torch.stack([x0[own].norm() for x0, own in zip(noise, free, strict=True)])
    mel = optimisation(MelReward(target=TARGET), updates=60)(policy, prompts(3), generator=seeded(), **OPTIONS).mel
    x = (mel - FLOW.mean) / FLOW.deviation
    torch.testing.assert_close(x.flatten(1).norm(dim=1), radius, rtol=1e-4, atol=0.0)
    want = (TARGET - FLOW.mean) / (TARGET - FLOW.mean).norm()
    cosine = (x * want).sum((1, 2)) / radius
    assert cosine.min() > math.cos(0.1 / 60 * 2)  # within two of the last angles


def test_no_updates_are_plain_sampling_and_more_never_lower_the_score() -> None:
    policy, own, reward = tiny_policy(), tiny_prompts(), MelReward(target=0.1)
    plain = rollout(policy, own, generator=seeded(4), grad_steps=0, steps=3)
    none = optimisation(reward, updates=0)(policy, own, generator=seeded(4), steps=3)
    torch.testing.assert_close(none.mel, plain.mel, rtol=1e-5, atol=1e-6)
    assert not none.mel.requires_grad and all(p.grad is None for p in policy.parameters())

    def score(mel: Tensor, row: int) -> float:
        return -(mel[row, : plain.lengths_frames[row]] - 0.1).square().sum().item() / 2

    together = optimisation(reward, updates=4)(policy, own, generator=[item_generator(0, row) for row in range(3)])
    for row in range(3):
        start = rollout(policy, own.select([row]), generator=[item_generator(0, row)], grad_steps=0).mel
        alone = optimisation(reward, updates=4)(policy, own.select([row]), generator=[item_generator(0, row)]).mel
        torch.testing.assert_close(together.mel[row, : alone.shape[1]], alone[0], rtol=1e-3, atol=1e-3)
        assert score(together.mel, row) > -(start[0] - 0.1).square().sum().item() / 2 + 0.5


def test_a_step_by_hand() -> None:
    """x = (3, 4) in frames 1 and 2, gradient (1, 2) there: along x it is (1 * 3 + 2 * 4) / 25 x = (1.32, 1.76),

    across it (-0.32, 0.24), of length 0.4: direction (-0.8, 0.6). A quarter turn on the sphere is 5 (-0.8, 0.6); a step
    of 0.5 with the Gaussian prior is 0.5 sqrt(2) (1, 2) / sqrt(5). Frame 0 stays.
    """
    x0, gradient = torch.tensor([[7.0], [3.0], [4.0]]), torch.tensor([[9.0], [1.0], [2.0]])
    free = torch.tensor([False, True, True])
    turned = moved(x0, gradient, free, math.pi / 2, "sphere")
    assert turned.flatten().tolist() == pytest.approx([7.0, -4.0, 3.0], abs=1e-5)
    walked = moved(x0, gradient, free, 0.5, "gaussian")
    length = 0.5 * (2 / 5) ** 0.5
    assert walked.flatten().tolist() == pytest.approx([7.0, 3 + length, 4 + 2 * length])
    for useless in (torch.full((3, 1), math.nan), torch.zeros(3, 1)):
        assert torch.equal(moved(x0, useless, free, 0.5, "gaussian"), x0)


@dataclass
class Fails(MelReward):
    """The first row has no score, or a score whose gradient is NaN."""

    what: str = "score"

    def score(self, audio: Audio, p: Prompts) -> Tensor:
        scores = super().score(audio, p)
        first = scores[:1]
        broken = first + math.nan if self.what == "score" else first + 0 * (first - first.detach()).sqrt()
        return torch.cat([broken, scores[1:]])


@pytest.mark.parametrize("what", ["score", "gradient"])
def test_a_row_without_a_score_or_gradient_is_spoken_plainly(what: str) -> None:
    policy, reward = GaussianPolicy(STEPS, exact=True), Fails(what=what)
    plain = rollout(policy, prompts(2), generator=seeded(), grad_steps=0, **OPTIONS).mel
    for sampler in (optimisation(reward), guidance(reward)):
        mel = sampler(policy, prompts(2), generator=seeded(), **OPTIONS).mel
        torch.testing.assert_close(mel[0], plain[0])
        assert (mel[1] - plain[1]).abs().max() > 0.05


# Step guidance.


def test_scale_zero_is_plain_sampling() -> None:
    policy, own = tiny_policy(), tiny_prompts()
    plain = rollout(policy, own, generator=seeded(4), grad_steps=0, steps=3)
    zero = guidance(MelReward(target=0.1), scale=0.0)(policy, own, generator=seeded(4), steps=3)
    late = guidance(MelReward(target=0.1), first_time=1.0)(policy, own, generator=seeded(4), steps=3)
    assert torch.equal(zero.mel, plain.mel) and torch.equal(late.mel, plain.mel)


def test_a_linear_reward_is_followed_to_the_tilted_mean() -> None:
    """p exp(scale k sum x_1) moves the mean by scale k d^2. The guided velocity is exact; Euler's sum of its pushes

    (1 - t) d^2 / s_t^2 carried on by d / s_{t'} differs by the missing first step and its order: 3 % with 64 steps.
    """
    policy, scale, k = GaussianPolicy(64), 0.5, 1.5
    options = {**OPTIONS, "steps": 64}
    plain = rollout(policy, prompts(2), generator=seeded(), grad_steps=0, **options).mel
    mel = guidance(MelReward(k), scale=scale)(policy, prompts(2), generator=seeded(), **options).mel
    shift = mel - plain
    assert shift.mean().item() == pytest.approx(scale * k * FLOW.deviation**2, rel=0.03)
    assert shift.std() < 1e-4, "every sample moves alike"


def test_one_guided_step_by_hand() -> None:
    """At t = 1/2 of two steps, r = -sum (x_1 - c)^2 / 2: v + scale (1 - t) / t J (c - x1_hat), J = d x1_hat / dx."""
    policy = GaussianPolicy(2)
    mel = guidance(MelReward(target=TARGET), scale=0.7)(policy, prompts(1), generator=seeded(), **OPTIONS).mel
    noise, free = drawn_noise(policy, prompts(1), seeded(), cfg_strength=0.0)
    x0 = noise[0][free[0]]
    x = x0 + 0.5 * FLOW.velocity(x0, torch.tensor(0.0))
    v = FLOW.velocity(x, torch.tensor(0.5))
    jacobian = 0.5 * FLOW.deviation**2 / FLOW.scale(torch.tensor(0.5)) ** 2  # t d^2 / s_t^2
    push = 0.7 * 1.0 * jacobian * (TARGET - (x + 0.5 * v))
    torch.testing.assert_close(mel[0], x + 0.5 * (v + push), rtol=1e-4, atol=1e-5)


def test_each_item_is_guided_as_it_would_be_alone() -> None:
    policy, own = tiny_policy(), tiny_prompts()
    sampler = guidance(MelReward(target=0.1), scale=0.2)
    together = sampler(policy.train(), own, generator=[item_generator(0, row) for row in range(3)], steps=4)
    assert policy.training
    for row in range(3):
        alone = sampler(policy, own.select([row]), generator=[item_generator(0, row)], steps=4).mel[0]
        torch.testing.assert_close(together.mel[row, : len(alone)], alone, rtol=1e-3, atol=1e-4)


def test_the_reference_frames_are_not_guided() -> None:
    """Attention makes the reward depend on every frame; what is added to the velocity is zero in those of the clip."""
    policy, own = tiny_policy().eval(), tiny_prompts().select([0])
    guided = Guided(policy, guidance(MelReward(), scale=3.0))
    cond = guided.encode(own)
    x, t = policy.prior(cond.policy, seeded()), torch.tensor(0.5)
    added = (guided.velocity(x, t, cond) - policy.velocity(x, t, cond.policy)).detach()
    assert (added[~cond.generated] == 0).all() and (added[cond.generated] != 0).all()


# Both.


def test_the_evaluation_judges_them_under_the_same_prompts_and_seeds() -> None:
    policy, own, rewards = tiny_policy(), tiny_prompts(), Rewards([MelReward(target=0.1)])
    options: dict[str, Any] = dict(sampling=Sampling(steps=3), judges=[], seed=3)
    plain = torch.tensor(evaluate(policy, Silent(), rewards, own, **options).measures["reward"])
    for sampler in (
        NoiseOptimisation(vocoder=Silent(), rewards=rewards, updates=4),
        StepGuidance(vocoder=Silent(), rewards=rewards, scale=0.1),
    ):
        result = evaluate(policy, Silent(), rewards, own, sampler=sampler, **options)
        assert (torch.tensor(result.measures["reward"]) > plain + 0.1).all()


def test_what_cannot_be_is_refused() -> None:
    deaf = Rewards([MelReward(differentiable=False)])
    for sampler in (NoiseOptimisation, StepGuidance):
        with pytest.raises(ValueError, match=r"expected a vocoder and rewards with one, got none of \['mel'\]"):
            sampler(vocoder=Silent(), rewards=deaf)
        mute = Silent()
        mute.differentiable = False
        with pytest.raises(ValueError, match="no gradient of the vocoder"):
            sampler(vocoder=mute, rewards=Rewards([MelReward()]))
    for options in ({"updates": -1}, {"step_size": 0.0}, {"prior": "cube"}, {"prior_weight": 0.1}):
        with pytest.raises(ValueError, match="of noise optimisation: expected"):
            optimisation(MelReward(), **options)
    for options in ({"scale": math.inf}, {"first_time": 2.0}):
        with pytest.raises(ValueError, match="of step guidance: expected"):
            guidance(MelReward(), **options)
