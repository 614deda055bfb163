"""Every algorithm, from one start, trains to the optimum that is known of it; and the problem it is known of.

The start is `Movable` (forward_problems.py): a Gaussian flow with one trainable number, theta, by which the mean of
what is generated moves: exactly, by Euler's steps, by noisy steps, by re-noised ends and by one-step predictions. So
without an anchor each method rests where the mean of x_1 is what the reward likes best, wherever it cuts its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from forward_problems import ELEMENTS, STEPS, Movable, pipeline, prompts, slope, tilted_shift, train
from gaussian import FLOW, GaussianPolicy, MelReward
from torch import Tensor

from rlhf_mel.algorithms.base import algorithm_class, known_algorithms, load_algorithm

# The problem.


def times_and_values() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0.0], [0.3], [0.8], [1.0]]).double(), torch.linspace(-3, 3, 50).double()


def test_its_density_is_that_of_its_solution() -> None:
    """x_t = t mean + s_t x_0 of x_0 ~ N(0, 1), as torch.distributions transforms it."""
    times, x = times_and_values()
    for t in times:
        move = torch.distributions.AffineTransform(FLOW.solution(torch.zeros(1), t), FLOW.scale(t))
        noise = torch.distributions.Normal(torch.zeros(1).double(), torch.ones(1).double())
        want = torch.distributions.TransformedDistribution(noise, [move]).log_prob(x)
        torch.testing.assert_close(FLOW.log_density(x, t), want)


def test_its_score_is_the_gradient_of_its_log_density() -> None:
    t, x = times_and_values()
    x = x.expand(len(t), -1).clone().requires_grad_()
    (want,) = torch.autograd.grad(FLOW.log_density(x, t).sum(), x)
    torch.testing.assert_close(FLOW.score(x.detach(), t), want)


@pytest.mark.parametrize("linear", [0.0, 1.5])
@pytest.mark.parametrize("curvature", [0.0, 4.0])
def test_its_optimum_is_the_tilted_density(linear: float, curvature: float) -> None:
    """Against p(x) exp(r(x) / beta) on a grid, normalised there: every value, the mean and the deviation."""
    beta, step, target = 0.8, 1e-3, -0.3
    x, end = torch.arange(-6, 6, step).double(), torch.ones(1).double()
    reward = linear * x - curvature * (x - target).square() / 2
    tilted = (FLOW.log_density(x, end) + reward / beta).exp()
    tilted = tilted / (tilted.sum() * step)
    optimum = FLOW.tilted(beta, slope=linear, curvature=curvature, target=target)
    torch.testing.assert_close(optimum.log_density(x, end).exp(), tilted, rtol=1e-6, atol=1e-12)
    mean = (tilted * x).sum().item() * step
    variance = (tilted * (x - mean).square()).sum().item() * step
    assert (optimum.mean, optimum.deviation) == pytest.approx((mean, variance**0.5))


# Without an anchor.

TARGET, BETA = 1.2, 2.0
REGRESSION: Mapping[str, Any] = dict(num_noise_samples=2, scale_rewards="batch", advantage_clip=5.0)

MAXIMUM: Mapping[str, tuple[str, Mapping[str, Any], float, int]] = {
    "draft": ("draft", {}, 2.0, 60),
    "draft, 3 steps": ("draft", dict(grad_steps=3), 0.3, 60),
    "draft, all steps": ("draft", dict(grad_steps=None), 0.05, 60),
    "draft_lv": ("draft_lv", {}, 2.0, 60),
    "alignprop": ("alignprop", {}, 0.1, 60),
    "refl": ("refl", {}, 0.5, 60),
    "flow_grpo": ("flow_grpo", dict(window_size=None, window_range=[1, STEPS - 1]), 1.0, 150),
    "ddpo": ("ddpo", {}, 1.0, 150),
    "orw_cfm": ("orw_cfm", dict(num_noise_samples=2), 0.3, 60),
    "diffusion_nft": ("diffusion_nft", REGRESSION, 0.15, 60),
    "awm": ("awm", dict(**REGRESSION, ema_beta=0.5), 0.1, 60),
}
"""Title to algorithm, options, learning rate and updates: all that can do without an anchor."""


@pytest.mark.parametrize("title", MAXIMUM)
def test_without_an_anchor_it_reaches_the_maximum(title: str) -> None:
    """Of -sum (x - 1.2)^2 / 2, from 0.7: within 5 % of the way.

    Where the reward's gradient is followed, the mean of 128 rollouts of 6 elements has the error D / sqrt(768) =
    0.0245, that of 30 averaged updates 0.0045: 5 % is 5.6 of these.
    """
    name, options, rate, updates = MAXIMUM[title]
    parts = pipeline(Movable(), MelReward(target=TARGET), anchored=False)
    theta = train(load_algorithm(name, options), parts, updates=updates, rate=rate)
    assert theta.item() == pytest.approx(TARGET - Movable.flow.mean, rel=0.05)


# With an anchor.

SHIFT = Movable.flow.tilted(BETA, slope=1.0).mean - Movable.flow.mean

TILTED: Mapping[str, tuple[Mapping[str, Any], float]] = {
    "adjoint_matching": (dict(max_push=None), SHIFT),
    "ram": (dict(num_noise_samples=2, scale_rewards="none"), tilted_shift(1.0, BETA)),
}
"""Algorithm to options and theta: the flow's own tilted mean, or that of what its Euler steps generate."""


@pytest.mark.parametrize("name", TILTED)
def test_what_cannot_do_without_an_anchor_reaches_the_tilted_mean(name: str) -> None:
    options, shift = TILTED[name]
    theta = train(load_algorithm(name, options, beta=BETA), pipeline(Movable(), MelReward()), updates=100, rate=0.1)
    assert theta.item() == pytest.approx(shift, rel=0.05)


def test_no_algorithm_is_left_out() -> None:
    of_rollouts = {name for name in known_algorithms() if not algorithm_class(name).learns_from_pairs}
    assert {name for name, *_ in MAXIMUM.values()} | set(TILTED) == of_rollouts  # pairs: test_pairs_optimum.py


GRID = torch.linspace(0, 1, STEPS + 1)
FACTORS = 1 + slope(GRID[:-1]) / STEPS
LEFT = torch.stack([FACTORS[k + 1 :].prod() for k in range(STEPS)])
"""What later steps of Euler's leave of a change that step k makes."""


def of_steps(first: int, values: Tensor) -> Tensor:
    """`values` [S] of the steps from `first` on, 0 before."""
    return values.where(torch.arange(STEPS) >= first, 0.0)


def balanced(cuts: Sequence[int]) -> Tensor:
    """Shifts [S] at which reward and anchor balance where the last K steps carry gradients, K drawn from `cuts`.

    A shift of step k moves each of the D elements by dt_k LEFT_k. The anchor of K steps, the mean of shift^2 over their
    own duration 1 - t_{S-K}, grows by 2 dt_k shift_k / (1 - t_{S-K}). Both count where step k is among the K. With all
    steps it is the optimum of E[r] - beta int |v - v_ref|^2 dt over all velocities: of a linear flow and reward it
    depends on t only. With fewer the earlier steps do not move, and the others less: the duration is shorter.
    """
    rewards = torch.stack([of_steps(STEPS - cut, ELEMENTS * LEFT) for cut in cuts]).sum(0)
    anchors = torch.stack([of_steps(STEPS - cut, 2 * BETA / (1 - GRID[STEPS - cut]).expand(STEPS)) for cut in cuts])
    return torch.where(rewards > 0, rewards / anchors.sum(0), 0.0)


ODE: Mapping[str, Any] = dict(dynamics="ode", max_push=None)

ANCHORED: Mapping[str, tuple[str, Mapping[str, Any], Tensor, float, int]] = {
    "draft": ("draft", {}, balanced([1]), 0.4, 100),
    "draft, 3 steps": ("draft", dict(grad_steps=3), balanced([3]), 0.4, 100),
    "draft, all steps": ("draft", dict(grad_steps=None), balanced([STEPS]), 0.4, 100),
    "draft_lv": ("draft_lv", {}, balanced([1]), 0.4, 100),
    "alignprop": ("alignprop", dict(min_grad_steps=5), balanced([5, 6, 7, 8]), 0.4, 300),
    # The jump from t moves x_1 by (1 - t) shift, and its anchor is shift^2.
    "refl": ("refl", dict(window=0.5), of_steps(4, ELEMENTS * (1 - GRID[:-1]) / (2 * BETA)), 0.4, 200),
    # u = g, that is LEFT / beta, in the steps that it trains: see adjoint_matching.py.
    "adjoint_matching, ode": ("adjoint_matching", ODE, LEFT / BETA, 2.0, 100),
    "adjoint_matching, ode, 3 steps": (
        "adjoint_matching",
        dict(**ODE, last_steps=3),
        of_steps(STEPS - 3, LEFT / BETA),
        2.0,
        100,
    ),
}
"""Title to algorithm, options, the shift [S] of each step that it rests at, learning rate and updates."""


def shifted() -> GaussianPolicy:
    """The start of `Movable`, with a number for each step."""
    return GaussianPolicy(STEPS, grid=GRID, train_slope=False, flow=Movable.flow)


@pytest.mark.parametrize("title", ANCHORED)
def test_with_an_anchor_every_step_comes_to_rest_where_its_own_objective_is_best(title: str) -> None:
    """To 0.1 %: r = sum x has one gradient for all rollouts, and SGD takes a fifth or more of the way that is left.

    AlignProp to 5 %: each K that it draws has another point of rest.
    """
    name, options, shifts, rate, updates = ANCHORED[title]
    algorithm = load_algorithm(name, options, beta=BETA)
    got = train(algorithm, pipeline(shifted(), MelReward()), updates=updates, rate=rate, batch=2)
    torch.testing.assert_close(got, shifts, rtol=0.05 if name == "alignprop" else 1e-3, atol=1e-6)


def test_both_policies_are_one_at_the_start() -> None:
    starts = [
        pipeline(policy).sample(prompts(4), torch.Generator().manual_seed(0)) for policy in (Movable(), shifted())
    ]
    torch.testing.assert_close(starts[0].mel, starts[1].mel)
