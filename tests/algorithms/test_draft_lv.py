"""DRaFT-LV: the gradient's mean is DRaFT-1's, its variance is the one derived, each item is what it is alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gaussian import ELEMENTS, FLOW, GaussianPolicy, MelReward, pipeline, prompts
from problems import tiny_policy, tiny_prompts
from torch import Tensor

from rlhf_mel.algorithms.base import Algorithm, load_algorithm
from rlhf_mel.algorithms.draft import Draft
from rlhf_mel.algorithms.draft_lv import DraftLV, renoised
from rlhf_mel.flow.noise import item_generators
from rlhf_mel.flow.policy import rollout
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.pipeline import Pipeline, Sampling

STEPS, ROLLOUTS, TARGET = 2, 1500, -0.2
T = torch.tensor(0.5)
"""The last time of the grid."""


def item_gradients(algorithm: Algorithm) -> Tensor:
    """d loss_b / d shift_{K-1} of each of the rollouts, by one call for each."""
    policy = GaussianPolicy(STEPS, exact=True)
    parts, own = pipeline(policy, MelReward(target=TARGET)), prompts(ROLLOUTS)
    weight = torch.ones(ROLLOUTS, requires_grad=True)
    # d/dw_b of the gradient of a loss weighted by w_b is the gradient of item b: both are linear in it.
    original = parts.rewards.models[0].score
    parts.rewards.models[0].score = lambda audio, p: (
        original(audio, p)
        * weight.repeat_interleave(  # type: ignore
            len(audio.mel) // ROLLOUTS
        )
    )
    loss, _ = algorithm.loss(parts, own, torch.Generator().manual_seed(0))
    (total,) = torch.autograd.grad(loss, policy.shift, create_graph=True)
    (each,) = torch.autograd.grad(total[-1], weight)
    return each * ROLLOUTS


def closed_form(n: int | None) -> tuple[float, float]:
    """Mean and variance of an item's gradient; n = None: DRaFT-1.

    r = -sum (x_1 - c)^2 / 2 over D elements, x_1 = m + J (x_t - t m) with J = d / s_t in the last step, and x_t moves
    x_1 by dt = 1 - t for a unit of shift: d(-r)/d shift = (1 - t) sum (x_1 - c). x_1 ~ N(m, d^2) either way. With LV
    x_t = (1 - t) eps + t x, x ~ N(m, d^2): of its variance s_t^2 = t^2 d^2 + (1 - t)^2 the second part is averaged.
    """
    m, d, t = FLOW.mean, FLOW.deviation, T.item()
    jacobian_squared = d**2 / FLOW.scale(T).item() ** 2
    spread = t**2 * d**2 + (1 - t) ** 2 / (n or 1)
    return (1 - t) * ELEMENTS * (m - TARGET), (1 - t) ** 2 * ELEMENTS * jacobian_squared * spread


@pytest.mark.parametrize("n", [None, 1, 2, 4])
def test_mean_and_variance_of_the_gradient(n: int | None) -> None:
    """1,500 rollouts: the mean within 4.5 standard errors, the variance within 4.5 sqrt(2 / 1500) = 16 %."""
    algorithm = Draft() if n is None else DraftLV(DraftLV.Config(num_renoisings=n))
    gradients = item_gradients(algorithm)
    mean, variance = closed_form(n)
    assert gradients.mean().item() == pytest.approx(mean, abs=4.5 * (variance / ROLLOUTS) ** 0.5)
    assert gradients.var().item() == pytest.approx(variance, rel=4.5 * (2 / ROLLOUTS) ** 0.5)


def test_two_renoisings_halve_the_last_noise() -> None:
    assert closed_form(1) == closed_form(None)
    # t = 1/2, d = 0.4: t^2 d^2 = 0.04 against (1 - t)^2 = 0.25
    assert closed_form(2)[1] / closed_form(None)[1] == pytest.approx((0.04 + 0.125) / (0.04 + 0.25))


def test_the_noisy_sample_by_hand() -> None:
    """t = 0.8 leaves 0.8 of the sample and 0.2 of that item's own noise; each item keeps its own frames."""
    x1 = torch.arange(12.0).reshape(2, 3, 2)
    states = renoised(x1, torch.tensor([3, 2]), torch.tensor(0.8), torch.Generator().manual_seed(0))
    generators = item_generators(torch.Generator().manual_seed(0), 2)
    assert generators is not None
    for row, frames in enumerate((3, 2)):
        noise = torch.randn(frames, 2, generator=generators[row])
        torch.testing.assert_close(states[row], 0.8 * x1[row, :frames] + 0.2 * noise)
    assert not torch.equal(states[0][:2] - 0.8 * x1[0, :2], states[1] - 0.8 * x1[1, :2])


def mel_pipeline() -> Pipeline:
    """A DiT that has moved away from its reference; the reward wants every mel at 0.1."""
    policy = tiny_policy()
    reference = ReferencePolicy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02)
    parts = pipeline(GaussianPolicy(4), MelReward(target=0.1))
    sampling = Sampling(steps=4, cfg_strength=1.5)
    return dataclasses.replace(parts, policy=policy, reference=reference, sampling=sampling)


def test_the_loss_is_that_of_a_plain_loop_over_items_and_noises() -> None:
    """Three prompts of two durations: the batch is what each is alone, by steps written out here."""
    parts, own, n, beta = mel_pipeline(), tiny_prompts(), 2, 0.7
    policy, reference = parts.policy, parts.reference
    policy.train()
    algorithm = DraftLV(DraftLV.Config(num_renoisings=n), beta=beta)
    loss, metrics = algorithm.loss(parts, own, torch.Generator().manual_seed(1))
    loss.backward()
    got = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    assert policy.training

    policy.eval()
    generator = torch.Generator().manual_seed(1)
    spoken = rollout(policy, own, generator=generator, grad_steps=0, return_trajectory=True, steps=4, cfg_strength=1.5)
    noises = item_generators(generator, 3 * n)
    t = policy.timesteps(4, sway_sampling_coef=-1.0)[-2]
    rewards, anchors = [], []
    for place in range(3 * n):
        row = place // n
        alone = own.select([row])
        cond = policy.encode(alone, cfg_strength=1.5)
        x1 = spoken.trajectory[-1, row, : alone.durations_frames]
        x = (1 - t) * torch.randn(x1.shape, generator=noises[place]) + t * x1
        v = policy.velocity(x[None], t, cond)
        mel = (x + (1 - t) * v[0])[cond.generated[0]]
        v_ref = reference.velocity(x[None], t, reference.encode(alone, cfg_strength=1.5))
        rewards.append(-(mel - 0.1).square().sum() / 2)
        anchors.append((v - v_ref)[cond.generated].square().mean())
    plain = -torch.stack(rewards).mean() + beta * torch.stack(anchors).mean()
    plain.backward()
    torch.testing.assert_close(metrics["reward"], torch.stack(rewards).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["anchor"], torch.stack(anchors).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    largest = max(float(grad.abs().max()) for grad in got.values())
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'draft_lv' follows the gradient.*reward 'mel' without a gradient"):
        load_algorithm("draft_lv").check(pipeline(GaussianPolicy(2), MelReward(differentiable=False)))
    with pytest.raises(ValueError, match="num_renoisings of draft_lv: expected a whole number of at least 1, got 0"):
        load_algorithm("draft_lv", {"num_renoisings": 0})
