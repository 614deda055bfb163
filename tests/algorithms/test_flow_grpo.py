"""The score-function family: losses by hand, gradients in closed form, and training to optima that are known.

The policy is that of gaussian.py with its shift theta_k alone. Its chain is x_{k+1} = a_k x_k + b_k + c_k theta_k +
std_k z, so the mean of x_K, its gradient by theta and the optimum are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussian import ELEMENTS, FLOW, REFERENCE, GaussianPolicy, pipeline, prompts
from problems import LinearGaussianFlow, MelReward, tiny_policy, tiny_prompts
from torch import Tensor

from rlhf_mel.algorithms.base import Algorithm, Clip, load_algorithm
from rlhf_mel.algorithms.ddpo import DDPO, PromptStatistics
from rlhf_mel.algorithms.families.advantages import score_advantages
from rlhf_mel.algorithms.families.policy_gradient import (
    clipped_shares,
    clipped_surrogate,
    guard_log_ratio,
    ratios,
)
from rlhf_mel.algorithms.flow_grpo import FlowGRPO, window_at
from rlhf_mel.flow.ode import timesteps
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.flow.sde import SDE, Transition, transition_kl
from rlhf_mel.flow.sde_rollout import replay
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.training.arguments import parse_arguments
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.types import Prompts, Scores

NAN = float("nan")
STEPS = 6
GRID = timesteps(STEPS, use_epss=False)


def shifted() -> GaussianPolicy:
    """A number for each step, and no more: with it every path distribution that is asked for here can be reached."""
    return GaussianPolicy(STEPS, train_slope=False)


def speech_pipeline(policy: Any, reward: object) -> Pipeline:
    parts = pipeline(shifted(), reward)
    return replace(parts, policy=policy, reference=ReferencePolicy(policy), sampling=Sampling(steps=5))


def chain(sde: SDE, window: Sequence[int]) -> list[tuple[float, float, float, float]]:
    """(a_k, b_k, c_k, std_k) of each step, by the value of the step at x = 0 and 1, theta = 0 and 1."""
    steps = []
    for k in range(STEPS):

        def end(x: float, theta: float, k: int = k) -> tuple[float, float]:
            at = torch.full((1, 1, 1), x)
            v = FLOW.velocity(at, GRID[k]) + theta
            if k in window:
                step = sde.transition(at, v, GRID, k)
                return step.mean.item(), float(step.std)
            return (at + (GRID[k + 1] - GRID[k]) * v).item(), 0.0

        (base, std), (shifted, _), (pushed, _) = end(0.0, 0.0), end(1.0, 0.0), end(0.0, 1.0)
        steps.append((shifted - base, base, pushed - base, std))
    return steps


def carried(steps: Sequence[tuple[float, float, float, float]]) -> list[float]:
    """How much of a push in step k is left at the end: a_{k+1} ... a_{K-1}."""
    return [math.prod(a for a, *_ in steps[k + 1 :]) for k in range(len(steps))]


def end_mean(steps: Sequence[tuple[float, float, float, float]], theta: Tensor) -> float:
    mean = 0.0
    for (a, b, c, _), push in zip(steps, theta.tolist(), strict=True):
        mean = a * mean + b + c * push
    return mean


# Losses by hand.


def test_the_clipped_surrogate_by_hand() -> None:
    ratio = torch.tensor([[0.7, 1.5, 1.5], [1.5, 0.7, 0.7]])
    advantages = torch.tensor([2.0, -1.0, 1.0])
    # Bounds 0.8 and 1.3. A = 2: max(-1.4, -1.6), max(-3.0, -2.6); A = -1: max(1.5, 1.3), max(0.7, 0.8);
    # A = 1: max(-1.5, -1.3), max(-0.7, -0.8).
    clip = Clip(low=0.2, high=0.3)
    got = clipped_surrogate(ratio, advantages, clip)
    assert torch.allclose(got, torch.tensor([[-1.4, 1.5, -1.3], [-2.6, 0.8, -0.7]]))
    shares = clipped_shares(ratio, advantages, clip)
    assert shares["clip_ratio/high_mean"].tolist() == [0.5, 0.0, 0.5]
    assert shares["clip_ratio/low_mean"].tolist() == [0.0, 0.5, 0.0]
    assert shares["clip_ratio/region_mean"].tolist() == [0.5, 0.5, 0.5]


def test_the_bounds_stop_the_gradient_on_one_side_only() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5], requires_grad=True)
    clipped_surrogate(ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), Clip(low=0.2, high=0.2)).sum().backward()
    assert ratio.grad is not None and ratio.grad.tolist() == [-1.0, 0.0, 0.0, 1.0]


def test_guard_and_divergence_on_three_numbers_by_hand() -> None:
    counted = torch.tensor([[False, True, True, True]])
    x, mean, old = (
        torch.tensor(v).reshape(1, 4, 1) for v in ([9.0, 1.0, 2.0, 3.0], [9.0, 1.5, 1.5, 2.0], [0.0, 1.0, 1.0, 1.0])
    )
    transition = Transition(mean, torch.tensor(0.5))
    # (0.5 * 0 + 0.5 * 1 + 1 * 2) / 0.5 / 3
    assert guard_log_ratio(x, transition, old, counted).item() == pytest.approx(5 / 3)
    # (0.25 + 0.25 + 1) / (2 * 0.25) / 3
    assert transition_kl(transition, old, counted).item() == pytest.approx(1.0)


def test_guard_is_the_log_ratio_without_its_bias_times_std() -> None:
    """GRPO-Guard: std (log p - log p_old + |dm|^2 / (2 std^2)), all as means over elements."""
    generator = torch.Generator().manual_seed(0)
    x, mean, old = (torch.randn(2, 4, 3, generator=generator) for _ in range(3))
    counted, std = torch.ones(2, 4, dtype=torch.bool), torch.tensor(0.4)
    log_probs = [torch.distributions.Normal(m, std).log_prob(x).mean((1, 2)) for m in (mean, old)]
    want = std * (log_probs[0] - log_probs[1] + (mean - old).square().mean((1, 2)) / (2 * std**2))
    torch.testing.assert_close(guard_log_ratio(x, Transition(mean, std), old, counted), want, rtol=1e-4, atol=1e-5)


# Gradients.


@pytest.mark.parametrize(("name", "guard"), [("flow_grpo", False), ("flow_grpo", True), ("ddpo", False)])
def test_the_first_ratio_is_exactly_one(name: str, guard: bool) -> None:
    policy = tiny_policy().train()
    parts = speech_pipeline(policy, MelReward())
    algorithm = load_algorithm(name, {"guard": True} if guard else {}, beta=0.3)
    algorithm.check(parts)
    own = tiny_prompts(group_ids=torch.tensor([0, 0, 0]))
    collected = algorithm.collect(parts, own, torch.Generator().manual_seed(1))
    for trajectory in collected.trajectories:
        ratio = ratios(trajectory, *replay(policy, trajectory), Clip(low=1e-4, high=1e-4, guard=guard))
        assert torch.equal(ratio, torch.ones_like(ratio))
    loss, metrics = algorithm.loss(parts, collected, torch.Generator())
    assert (metrics["kl"] == 0).all(), "the reference is the policy before training"
    assert all((metrics[f"clip_ratio/{bound}_mean"] == 0).all() for bound in ("low", "high", "region"))
    if not guard:
        assert loss.item() == pytest.approx(-collected.advantages.mean().item(), abs=1e-6)
    assert collected.advantages.abs().max() > 0.5
    loss.backward()
    assert policy.training and max(p.grad.abs().max() for p in policy.parameters() if p.grad is not None) > 1e-6


def test_later_ratios_are_those_of_the_densities() -> None:
    """exp of the mean over elements of log N(x'; mean + c_k 0.3, std) - log N(x'; mean, std)."""
    policy, window = shifted(), range(1, STEPS - 1)
    algorithm = DDPO(DDPO.Config(window_range=[1, STEPS - 1]))
    collected = algorithm.collect(pipeline(policy, MelReward()), prompts(4, 4), torch.Generator().manual_seed(0))
    (trajectory,) = collected.trajectories
    with torch.no_grad():
        policy.shift += 0.3
    got = ratios(trajectory, *replay(policy, trajectory), Clip(low=1.0, high=1.0))
    steps = chain(SDE(), window)
    for place, k in enumerate(window):
        *_, c, std = steps[k]
        after, mean = trajectory.states[place + 1][:, REFERENCE:], trajectory.means[place][:, REFERENCE:]
        log_probs = [torch.distributions.Normal(m, std).log_prob(after).mean((1, 2)) for m in (mean + 0.3 * c, mean)]
        torch.testing.assert_close(got[place], (log_probs[0] - log_probs[1]).exp(), rtol=1e-4, atol=1e-5)
    assert (got - 1).abs().max() > 0.05


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("kind", ["exponential", "flow_cps", "flow_sde"])
def test_the_first_gradient_is_reinforce(kind: Any, guard: bool) -> None:
    """-mean_i mean_k A_i mean_d z c_k / std, with z = (x' - mean) / std and c_k = d mean / d theta_k.

    With GRPO-Guard std and 1 / dt weigh the steps anew: -mean_i mean_k A_i mean_d z c_k / dt.
    """
    policy, sde = shifted(), SDE(kind=kind)
    window = range(1, STEPS - 1)
    parts = pipeline(policy, MelReward())
    algorithm = FlowGRPO(FlowGRPO.Config(sde=kind, window_range=[1, STEPS - 1], window_size=None, guard=guard))
    collected = algorithm.collect(parts, prompts(16, 8), torch.Generator().manual_seed(0))
    algorithm.loss(parts, collected, torch.Generator())[0].backward()
    (trajectory,) = collected.trajectories
    own = trajectory.states[..., REFERENCE:, :], trajectory.means[..., REFERENCE:, :]
    steps = chain(sde, window)
    for k in window:
        *_, c, std = steps[k]
        z = (own[0][k] - own[1][k - 1]) / std  # states begin at step 1: state k is after step k
        scale = float(GRID[k + 1] - GRID[k]) if guard else std
        want = -(collected.advantages * z.mean((1, 2)) * c / scale).mean() / len(window)
        torch.testing.assert_close(policy.shift.grad[k], want, rtol=1e-3, atol=1e-6)
    assert policy.shift.grad[0] == policy.shift.grad[STEPS - 1] == 0, "steps of the ODE have no probability"


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """E[gradient by theta_k] = -d E[r] / d theta_k / (elements * steps): d/dtheta of the mean of sum x = D P_k c_k.

    4,096 rollouts; within 4.5 standard errors, the deviation of a rollout's own term estimated from its parts.
    """
    batch, window, policy = 4096, range(1, STEPS - 1), shifted()
    parts = pipeline(policy, MelReward())
    algorithm = FlowGRPO(FlowGRPO.Config(window_range=[1, STEPS - 1], window_size=None, scale_rewards="none"))
    collected = algorithm.collect(parts, prompts(batch, group=batch), torch.Generator().manual_seed(0))
    collected = replace(collected, advantages=collected.metrics["reward"] - collected.metrics["reward"].mean())
    algorithm.loss(parts, collected, torch.Generator())[0].backward()
    steps = chain(SDE(), window)
    spread = collected.advantages.std().item()
    for k in window:
        *_, c, std = steps[k]
        want = -ELEMENTS * carried(steps)[k] * c / (ELEMENTS * len(window))
        error = 1.5 * spread * c / std / ELEMENTS**0.5 / len(window) / batch**0.5
        assert abs(policy.shift.grad[k].item() - want) < 4.5 * error < 0.5 * abs(want)


# Training to known optima.


def train(algorithm: Algorithm, parts: Pipeline, own: Prompts, *, updates: int, rate: float, reuse: int = 1) -> Tensor:
    """theta averaged over the second half of the updates; each batch is used `reuse` times."""
    policy = parts.policy
    assert isinstance(policy, GaussianPolicy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    kept, generator = [], torch.Generator().manual_seed(0)
    algorithm.check(parts)
    for update in range(updates):
        if update % reuse == 0:
            collected = algorithm.collect(parts, own, generator)
        optimizer.zero_grad()
        algorithm.loss(parts, collected, generator)[0].backward()
        optimizer.step()
        algorithm.on_update(parts)
        kept.append(policy.shift.detach().clone())
    return torch.stack(kept[updates // 2 :]).mean(0)


WINDOW = range(1, STEPS - 1)
FULL: dict[str, Any] = dict(window_range=[1, STEPS - 1])
PAIRS = [range(k, k + 2) for k in (1, 2, 3)]
"""The windows of two steps that lie in it."""


def tilted_shift(sde: SDE, window: Sequence[int], beta: float) -> float:
    """How far the KL-regularised optimum of E[sum of x] moves the mean: Var(x_K | x_0) / beta.

    Of the paths that begin at x_0, p* ~ p_ref exp(r / beta): a Gaussian tilted by a linear r keeps its spread and
    moves by variance / beta. That the policy has a theta for each step makes p* reachable.
    """
    steps = chain(sde, window)
    variance = sum((left * std) ** 2 for left, (*_, std) in zip(carried(steps), steps, strict=True))
    return LinearGaussianFlow(0.0, variance**0.5).tilted(beta, slope=1.0).mean


def moved(sde: SDE, window: Sequence[int], theta: Tensor) -> float:
    steps = chain(sde, window)
    return end_mean(steps, theta) - end_mean(steps, torch.zeros(STEPS))


@pytest.mark.parametrize("kind", ["exponential", "flow_cps", "flow_sde"])
def test_flow_grpo_reaches_the_tilted_mean(kind: Any) -> None:
    """Within 3 %, each step's theta within 0.06: 200 averaged updates of 128 rollouts leave about a third of that.

    The mean of a group of G counts the rollout itself, which takes 1 / G off the gradient of the reward.
    """
    policy, beta, group, sde = shifted(), 0.8, 16, SDE(kind=kind)
    algorithm = FlowGRPO(FlowGRPO.Config(sde=kind, window_size=None, scale_rewards="none", **FULL), beta=beta)
    theta = train(algorithm, pipeline(policy, MelReward(), anchored=True), prompts(128, group), updates=400, rate=1.0)
    share = 1 - 1 / group
    assert moved(sde, WINDOW, theta) == pytest.approx(share * tilted_shift(sde, WINDOW, beta), rel=0.03)
    steps = chain(sde, WINDOW)
    for k, ((_, _, c, std), left) in enumerate(zip(steps, carried(steps), strict=True)):
        best = share * left * std**2 / (beta * c) if k in WINDOW else 0.0
        assert theta[k].item() == pytest.approx(best, abs=0.06)


def test_with_rollouts_used_again_flow_grpo_reaches_it_too() -> None:
    """As above, to 4 %: four updates a batch, whose ratios differ from 1; groups start at one noise, batch scaling."""
    policy, beta, group = shifted(), 0.3, 16
    config = FlowGRPO.Config(window_size=None, scale_rewards="batch", epsilon=0.2, shared_prior=True, **FULL)
    algorithm = FlowGRPO(config, beta=beta)
    own = prompts(128, group)
    theta = train(algorithm, pipeline(policy, MelReward(), anchored=True), own, updates=600, rate=0.7, reuse=4)
    want = (1 - 1 / group) * tilted_shift(SDE(), WINDOW, beta) / reward_deviation(SDE(), WINDOW)
    assert moved(SDE(), WINDOW, theta) == pytest.approx(want, rel=0.04)


def reward_deviation(sde: SDE, window: Sequence[int]) -> float:
    """Of sum x_K over the elements, x_0 ~ N(0, 1)."""
    variance = 1.0
    for a, _, _, std in chain(sde, window):
        variance = a**2 * variance + std**2
    return (ELEMENTS * variance) ** 0.5


def test_ddpo_reaches_the_tilted_mean_in_units_of_the_deviation() -> None:
    """To 3 %; its advantages are divided by the deviation of the reward, its baseline is the batch's mean."""
    policy, beta, batch = shifted(), 0.3, 128
    algorithm = DDPO(DDPO.Config(**FULL), beta=beta)
    theta = train(algorithm, pipeline(policy, MelReward(), anchored=True), prompts(batch), updates=400, rate=1.0)
    want = (1 - 1 / batch) * tilted_shift(SDE(), WINDOW, beta) / reward_deviation(SDE(), WINDOW)
    assert moved(SDE(), WINDOW, theta) == pytest.approx(want, rel=0.03)


def resting_shifts(windows: Sequence[range], beta: float, guard: bool) -> Tensor:
    """theta where, in each step k, the pull of the anchor is the push of the linear reward, over all windows.

    In a window that k lies in, d E[r] / d theta_k = left_k c_k and d KL_k / d theta_k = c_k^2 theta_k / std_k^2, where
    left_k depends on which of the later steps are random: theta_k = std_k^2 / (beta c_k) times the mean of left_k, of
    one window the tilted mean. GRPO-Guard weighs the push, and not the anchor, by std_k / dt_k: another optimum.
    """
    theta = torch.zeros(STEPS)
    for k in range(STEPS):
        own = [chain(SDE(), window) for window in windows if k in window]
        if own:
            _, _, c, std = own[0][k]
            left = sum(carried(steps)[k] for steps in own) / len(own)
            theta[k] = left * std**2 / (beta * c) * (std / float(GRID[k + 1] - GRID[k]) if guard else 1.0)
    return theta


@pytest.mark.parametrize(
    ("options", "rate", "windows"),
    [
        ({}, 1.5, PAIRS),
        ({"window_shift_every": 5}, 1.5, PAIRS),
        ({"guard": True, "window_size": None}, 1.0, [WINDOW]),
        ({"guard": True}, 2.0, PAIRS),
    ],
    ids=["fast", "mixgrpo", "guard", "guard and fast"],
)
def test_windows_and_guard_rest_where_push_and_anchor_meet(options: Any, rate: float, windows: list[range]) -> None:
    """Shifts and what they move together, to 5 %: 150 averaged updates of 128 rollouts leave 1 to 3 %."""
    beta, group, policy = 0.4, 16, shifted()
    algorithm = FlowGRPO(FlowGRPO.Config(scale_rewards="none", **FULL, **options), beta=beta)
    parts = pipeline(policy, MelReward(), anchored=True)
    theta = train(algorithm, parts, prompts(128, group), updates=300, rate=rate)
    want = (1 - 1 / group) * resting_shifts(windows, beta, bool(algorithm.config.guard))
    assert (theta - want).norm() < 0.05 * want.norm()
    assert moved(SDE(), (), theta) == pytest.approx(moved(SDE(), (), want), rel=0.05)


@pytest.mark.parametrize(
    ("name", "options", "rate", "windows"),
    [
        ("ddpo", {}, 3.0, [range(STEPS - 1)]),
        ("flow_grpo", FULL, 3.0, PAIRS),
        ("flow_grpo", {"window_shift_every": 5, **FULL}, 3.0, PAIRS),
        ("flow_grpo", {"guard": True, "window_size": None, **FULL}, 1.5, [WINDOW]),
    ],
    ids=["ddpo", "fast", "mixgrpo", "guard"],
)
def test_without_an_anchor_they_reach_the_maximum(name: str, options: Any, rate: float, windows: list[range]) -> None:
    """-sum (x - 0.2)^2 is best where the mean of x is 0.2: within 0.02, from 0.7, by the steps they trained with.

    By the ODE alone, to 0.03: with noise a push decays otherwise on its way to the end.
    """
    policy = shifted()
    algorithm = load_algorithm(name, options, beta=0.0)
    parts = pipeline(policy, MelReward(target=0.2))
    theta = train(algorithm, parts, prompts(128, 16), updates=400, rate=rate)
    assert end_mean(chain(SDE(), range(0)), torch.zeros(STEPS)) == pytest.approx(0.7, abs=1e-6)
    for window in windows:
        assert end_mean(chain(SDE(), window), theta) == pytest.approx(0.2, abs=0.02)
    assert end_mean(chain(SDE(), range(0)), theta) == pytest.approx(0.2, abs=0.03)


# What the algorithms are fed with.


def test_reference_frames_change_neither_loss_nor_metrics() -> None:
    policy = shifted()
    parts = pipeline(policy, MelReward(), anchored=True)
    algorithm = FlowGRPO(FlowGRPO.Config(**FULL), beta=0.5)
    collected = algorithm.collect(parts, prompts(16, 8), torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.shift += 0.1  # ratios and divergences that are not those of the first update
    (trajectory,) = collected.trajectories
    loss, metrics = algorithm.loss(parts, collected, torch.Generator())
    changed = {}
    for frames in (slice(0, REFERENCE), slice(REFERENCE, None)):
        states = trajectory.states.clone()
        states[:, :, frames] += 1.0 + states[:, :, frames].square()
        changed[frames.start] = algorithm.loss(
            parts, replace(collected, trajectories=[replace(trajectory, states=states)]), torch.Generator()
        )
    assert torch.equal(changed[0][0], loss) and all(torch.equal(changed[0][1][n], metrics[n]) for n in metrics)
    assert not torch.equal(changed[REFERENCE][0], loss)


@pytest.mark.parametrize("name", ["flow_grpo", "ddpo"])
def test_a_rollout_without_a_reward_is_dropped_and_counted(name: str) -> None:
    def listener(completions: list, **columns: object) -> list[float | None]:
        return [1.0, None, 3.0, 2.0]

    policy = shifted()
    parts = pipeline(policy, listener)
    algorithm = load_algorithm(name, FULL, beta=0.0)
    collected = algorithm.collect(parts, prompts(4, 4), torch.Generator().manual_seed(0))
    # 1, 3, 2: mean 2, deviation 1.
    want = torch.tensor([-1.0, 0.0, 1.0, 0.0]) / 1.0001
    torch.testing.assert_close(collected.advantages, want)
    assert collected.dropped.tolist() == [False, True, False, False]
    loss, metrics = algorithm.loss(parts, collected, torch.Generator())
    assert metrics["dropped_rollouts"].tolist() == [False, True, False, False]
    loss.backward()
    whole = policy.shift.grad.clone()
    policy.zero_grad()
    # The dropped row has advantage 0: leaving it out is a mean over 3 instead of 4.
    nothing = torch.zeros(4, dtype=torch.bool)
    algorithm.loss(parts, replace(collected, dropped=nothing), torch.Generator())[0].backward()
    torch.testing.assert_close(whole, policy.shift.grad * 4 / 3)


def test_groups_with_nothing_to_choose_from_teach_nothing() -> None:
    def same(completions: list, **columns: object) -> list[float]:
        return [0.1] * len(completions)

    policy = shifted()
    parts = pipeline(policy, same)
    algorithm = FlowGRPO(FlowGRPO.Config(**FULL))
    loss, metrics = algorithm.loss(
        parts, algorithm.collect(parts, prompts(16, 8), torch.Generator()), torch.Generator()
    )
    loss.backward()
    assert (policy.shift.grad == 0).all() and metrics["frac_reward_zero_std"] == 1


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_several_rewards_become_clipped_advantages(aggregation: Any) -> None:
    weights = {"one": 1.0, "loud": 2.0}
    rewards = Rewards([MelReward(name="one"), MelReward(name="loud", scale=9.0, target=0.3)], list(weights.values()))
    parts = replace(pipeline(shifted(), MelReward()), rewards=rewards)
    config = FlowGRPO.Config(multi_objective_aggregation=aggregation, scale_rewards="batch", advantage_clip=1.2, **FULL)
    collected = FlowGRPO(config).collect(parts, prompts(16, 8), torch.Generator().manual_seed(0))
    heard = {name: collected.metrics[f"rewards/{name}"] for name in weights}
    want = score_advantages(
        Scores(collected.metrics["reward"], heard),
        weights,
        prompts(16, 8).group_ids,
        scale_rewards="batch",
        multi_objective_aggregation=aggregation,
    )
    assert want.abs().max() > 1.2
    torch.testing.assert_close(collected.advantages, want.clamp(-1.2, 1.2))


# Windows.


def test_windows_by_hand() -> None:
    assert [window_at(1, 7, 4, position) for position in range(4)] == [
        range(1, 5), range(2, 6), range(3, 7), range(1, 5)
    ]  # fmt: skip
    assert window_at(0, 5, None, 3) == range(0, 5)


def test_a_random_window_visits_its_range_and_a_sliding_one_walks_through_it() -> None:
    def starts(algorithm: FlowGRPO, parts: Pipeline) -> list[int]:
        found = []
        for seed in range(12):
            collected = algorithm.collect(parts, prompts(2, 2), torch.Generator().manual_seed(seed))
            (trajectory,) = collected.trajectories
            assert collected.metrics["window_start"] == trajectory.window.start and len(trajectory.window) == 2
            found.append(trajectory.window.start)
            algorithm.on_update(parts)
        return found

    parts = pipeline(shifted(), MelReward())
    assert set(starts(FlowGRPO(FlowGRPO.Config(**FULL)), parts)) == {1, 2, 3}
    sliding = FlowGRPO(FlowGRPO.Config(window_shift_every=2, **FULL))
    assert starts(sliding, parts) == [1, 1, 2, 2, 3, 3] * 2
    again = FlowGRPO(FlowGRPO.Config(window_shift_every=2, **FULL))
    again.load_state_dict({"updates": 2})
    assert starts(again, parts) == [2, 2, 3, 3, 1, 1] * 2


@pytest.mark.parametrize(
    ("steps", "sway", "expected"),
    [
        (16, -1.0, (7, 14)),  # step 7 begins at t = 0.058, step 13 at 0.444
        (16, None, (2, 12)),  # in 32nds: 2 and 14
        (7, -1.0, (4, 6)),  # 0.076 and 0.293
        (6, -1.0, (3, 5)),  # 0.043 and 0.076: the last step, from 0.293, has no noise
        (5, -1.0, (2, 4)),  # 0.019 and 0.076
    ],
)
def test_the_default_window_lies_where_steps_have_a_lever(
    steps: int, sway: float | None, expected: tuple[int, int]
) -> None:
    """Times are those of EPSS and 1 - cos(pi t / 2); see flow/sde.py."""
    sampling = Sampling(steps=steps, sway_sampling_coef=sway)
    parts = replace(speech_pipeline(tiny_policy(), MelReward()), sampling=sampling)
    assert FlowGRPO()._window_range(parts) == expected


# What cannot be meant.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flow_grpo", {"epsilon": 0.0}, "epsilon of flow_grpo: expected a number above 0"),
        ("flow_grpo", {"window_size": 0}, "window_size of flow_grpo: expected a whole number of at least 1"),
        ("flow_grpo", {"window_range": [3, 3]}, "window_range of flow_grpo: expected"),
        ("flow_grpo", {"scale_rewards": "std"}, "scale_rewards of flow_grpo"),
        ("flow_grpo", {"sde": "cps"}, "sde: expected one of"),
        ("ddpo", {"per_prompt_buffer": 4}, "per_prompt_buffer of ddpo: expected 0 or at least"),
        ("ddpo", {"advantage_clip": -1.0}, "advantage_clip of ddpo"),
        ("ddpo", {"scale_rewards": "group"}, r"scale_rewards of ddpo: expected one of \['batch', 'none'\]"),
        ("ddpo", {"multi_objective_aggregation": "sum"}, "multi_objective_aggregation of ddpo: expected one of"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_algorithm(name, options)


@pytest.mark.parametrize(
    ("name", "options", "sampling", "message"),
    [
        ("flow_grpo", {"window_range": [0, 6]}, {}, r"trains steps \[0, 6\): expected some of \[0, 5\)"),
        ("flow_grpo", {"window_size": 3}, {}, r"window_size of flow_grpo: expected at most the 2 steps of \[1, 3\)"),
        ("ddpo", {"noise_level": 0.0}, {}, "noise_level of ddpo: expected above 0"),
        ("ddpo", {}, {"method": "dopri5"}, "takes single steps: expected --solver"),
    ],
)
def test_runs_that_cannot_work_are_refused(name: str, options: Any, sampling: Any, message: str) -> None:
    parts = pipeline(shifted(), MelReward())
    with pytest.raises(ValueError, match=message):
        load_algorithm(name, options).check(replace(parts, sampling=replace(parts.sampling, **sampling)))


def test_the_command_line_speaks_trl() -> None:
    flags = ["--algorithm", "flow_grpo", "--num_generations", "4", "--num_iterations", "2", "--epsilon", "2e-4"]
    config, _ = parse_arguments([*flags, "--epsilon_high", "3e-4", "--scale_rewards", "none"])
    assert config.beta == 0.04 and config.num_iterations == 2
    algorithm = load_algorithm(config.algorithm, config.algorithm_options, beta=0.04)
    assert algorithm.clip == Clip(low=2e-4, high=3e-4) and algorithm.config.scale_rewards == "none"
    with pytest.raises(ValueError, match="compares rollouts of one prompt: expected num_generations of at least 2"):
        RLHFConfig(algorithm="flow_grpo")
    assert RLHFConfig(algorithm="ddpo").beta == 0.0


# DDPO's baselines.


def test_prompt_statistics_by_hand() -> None:
    statistics = PromptStatistics(buffer=3, min_count=2)
    # First batch: prompt 7 has 1 and 3 (mean 2, deviation sqrt 2), prompt 9 only 8: compared with all, mean 4.
    rewards = torch.tensor([1.0, 3.0, 8.0])
    got = statistics.advantages(rewards, [7, 7, 9], [(7, 1.0), (7, 3.0), (9, 8.0)])
    own, batch = math.sqrt(2) + 1e-4, math.sqrt((9 + 1 + 16) / 2) + 1e-4
    torch.testing.assert_close(got, torch.tensor([-1 / own, 1 / own, 4 / batch]))
    # Then 7 again, on another process 7 too: the last three are 3, 5, 4; 9's NaN is not remembered.
    restored = PromptStatistics(buffer=3, min_count=2)
    restored.load_state_dict(statistics.state_dict())
    for one in (statistics, restored):
        got = one.advantages(torch.tensor([5.0, NAN]), [7, 9], [(7, 5.0), (9, NAN), (7, 4.0)])
        torch.testing.assert_close(got, torch.tensor([1 / 1.0001, 0.0]))
    assert statistics.state_dict() == {7: [3.0, 5.0, 4.0], 9: [8.0]}


def test_without_a_buffer_the_batch_is_the_baseline() -> None:
    got = PromptStatistics(0, 2).advantages(torch.tensor([1.0, 3.0]), [7, 7], [(7, 1.0), (7, 3.0), (9, 5.0)])
    torch.testing.assert_close(got, torch.tensor([-2 / 2.0001, 0.0]))
    assert PromptStatistics(0, 2).advantages(torch.tensor([1.0]), [7], [(7, 1.0)]).tolist() == [0.0]


def test_ddpo_of_two_rewards_by_hand() -> None:
    """Deviations from the mean are -2, -1, 3 and 1, -1, 0, in standard deviations over sqrt 7 and 1; the last row has
    no reward of one kind and counts for nothing."""
    breakdown = {"a": torch.tensor([1.0, 2.0, 6.0, 50.0]), "b": torch.tensor([3.0, 1.0, 2.0, NAN])}
    weights = {"a": 1.0, "b": 2.0}
    scores = Scores(total=breakdown["a"] + 2 * breakdown["b"], breakdown=breakdown)

    def advantages(**options: Any) -> Tensor:
        return DDPO(DDPO.Config(**options))._advantages(scores, weights, [5, 5, 5, 5])

    torch.testing.assert_close(advantages(scale_rewards="none"), torch.tensor([0.0, -3.0, 3.0, 0.0]))
    torch.testing.assert_close(advantages(), torch.tensor([0.0, -3.0, 3.0, 0.0]) / (3 + 1e-4))
    root = math.sqrt(7) + 1e-4
    summed = torch.tensor([-2 / root + 2 / 1.0001, -1 / root - 2 / 1.0001, 3 / root])
    want = torch.cat([summed / (summed.square().sum().div(2).sqrt() + 1e-4), torch.zeros(1)])
    torch.testing.assert_close(advantages(multi_objective_aggregation="normalize_then_sum"), want)


def test_ddpo_remembers_each_reward_of_a_prompt() -> None:
    options = {"multi_objective_aggregation": "normalize_then_sum", "per_prompt_buffer": 2, "per_prompt_min_count": 2}
    algorithm, resumed = (DDPO(DDPO.Config(**options)) for _ in range(2))
    breakdown = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([0.5, 0.25])}
    algorithm._advantages(Scores(breakdown["a"] + breakdown["b"], breakdown), {"a": 1.0, "b": 1.0}, [7, 9])
    resumed.load_state_dict(algorithm.state_dict())
    assert resumed.state_dict() == {"a": {7: [1.0], 9: [3.0]}, "b": {7: [0.5], 9: [0.25]}}
