"""Random steps on a flow whose law is known: their moments, their densities, and the rollouts made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from problems import LinearGaussianFlow, peak_bytes, tiny_policy, tiny_prompts
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from rlhf_mel.flow.noise import item_generators
from rlhf_mel.flow.ode import solve, timesteps
from rlhf_mel.flow.policy import rollout
from rlhf_mel.flow.sde import SDE, SDE_KINDS, Transition, mean_log_prob, solve_sde, transition_kl
from rlhf_mel.flow.sde_rollout import replay, sde_rollout

FLOW = LinearGaussianFlow()
LEVELS = (0.1, 0.5, 1.0)


def grid(steps: int, sway: float | None) -> Tensor:
    return timesteps(steps, use_epss=False, sway_sampling_coef=sway, dtype=torch.float64)


def normal(shape: tuple[int, ...], seed: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


# One step.


@pytest.mark.parametrize("kind", SDE_KINDS)
@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_without_noise_it_is_the_ode_to_the_last_bit(kind: str, method: str) -> None:
    """By Euler in the window, by `method` outside."""
    x0, t = normal((2, 5, 3))(), timesteps(8, sway_sampling_coef=-1.0)
    window = range(0, 8) if method == "euler" else range(0)
    sde = SDE(kind=kind, noise_level=0.0)
    states, _ = solve_sde(FLOW.velocity, x0, t, sde, normal(x0.shape, 1), window=window, method=method)
    for state, ode in zip(states, solve(FLOW.velocity, x0, t, method=method), strict=True):
        assert torch.equal(state, ode)


@pytest.mark.parametrize("step", [0, 3, 7])
@pytest.mark.parametrize("kind", ["flow_sde", "flow_cps"])
def test_a_step_is_flow_grpos(kind: str, step: int) -> None:
    """sd3_sde_with_logprob.py of flow_grpo, whose sigma = 1 - t falls from 1 to 0 and whose output is -v."""
    x, t = normal((2, 5, 3))().double(), grid(8, -1.0)
    v, a = FLOW.velocity(x, t[step]), 0.7
    sigma, later, output = 1 - t[step], 1 - t[step + 1], -v
    if kind == "flow_sde":
        deviation = a * (sigma / (1 - (1 - t[1] if step == 0 else sigma))).sqrt()
        dt = later - sigma
        mean = x * (1 + deviation**2 / (2 * sigma) * dt) + output * (1 + deviation**2 * (1 - sigma) / (2 * sigma)) * dt
        std = deviation * (-dt).sqrt()
    else:
        std = later * math.sin(a * math.pi / 2)
        mel, noise = x - sigma * output, x + (1 - sigma) * output
        mean = mel * (1 - later) + noise * (later**2 - std**2).sqrt()
    got = SDE(kind=kind, noise_level=a).transition(x, v, t, step)
    assert_close(got.mean, mean, rtol=1e-12, atol=1e-12)
    assert_close(got.std, torch.as_tensor(std, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_exponential_step_solves_the_sde_with_the_mel_held_fixed() -> None:
    """Against 20,000 Euler steps of mean and variance, where v = (x_1 - x) / (1 - t)."""
    start, end, a, x, x1 = 0.2, 0.45, 0.7, 0.3, 1.1
    mean, variance, steps = x, 0.0, 20_000
    for k in range(steps):
        t, dt = start + (end - start) * k / steps, (end - start) / steps
        squared = a**2 * (1 - t) / t
        v = (x1 - mean) / (1 - t)
        slope = -1 / (1 - t) + squared / 2 * (-t / (1 - t) - 1) / (1 - t)
        mean, variance = (
            mean + dt * (v + squared / 2 * (t * v - mean) / (1 - t)),
            variance * (1 + dt * slope) ** 2 + squared * dt,
        )
    t = torch.tensor([0.0, start, end, 1.0], dtype=torch.float64)
    at = torch.tensor([[[x]]], dtype=torch.float64)
    got = SDE(noise_level=a).transition(at, (x1 - at) / (1 - start), t, 1)
    assert got.mean.item() == pytest.approx(mean, abs=1e-4) and got.std.item() == pytest.approx(variance**0.5, abs=1e-4)


def test_sdes_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sde: expected one of .*'flow_sde'.* got 'ddim'"):
        SDE(kind="ddim")
    with pytest.raises(ValueError, match=r"noise_level of flow_cps: expected 0 to 1, got 1\.5"):
        SDE(kind="flow_cps", noise_level=1.5)
    with pytest.raises(ValueError, match="ODE method beside SDE steps"):
        solve_sde(
            FLOW.velocity, torch.zeros(1, 1, 1), grid(2, None), SDE(), normal((1,)), window=range(1), method="dopri5"
        )


# Moments. Of the flow: x_t ~ N(t m, s_t^2). A step that is affine in x keeps a normal law normal.


def law(kind: str, level: float, t: Tensor) -> list[tuple[float, float]]:
    """Mean and deviation of each state of the chain, from E[x_1 | x], E[x_0 | x] and the score of the Gaussian flow."""
    mean, variance, states = 0.0, 1.0, [(0.0, 1.0)]
    for start, end in pairwise(t.tolist()):
        spread = (1 - start) ** 2 + start**2 * FLOW.deviation**2
        mel, noise = start * FLOW.deviation**2 / spread, (1 - start) / spread  # regressions on x - t m
        if kind == "flow_sde":
            squared = level**2 * (1 - start) / (start or float(t[1])) * (end - start)
            slope, added = 1 + (end - start) * (mel - noise) - squared / 2 / spread, squared
        else:
            rho = math.cos(math.pi / 2 * level)
            if kind == "exponential":
                rho = (start * (1 - end) / end / (1 - start)) ** (level**2 / 2)
            slope, added = end * mel + (1 - end) * rho * noise, (1 - end) ** 2 * (1 - rho**2)
        mean, variance = end * FLOW.mean + slope * (mean - start * FLOW.mean), slope**2 * variance + added
        states.append((mean, variance**0.5))
    return states


@pytest.mark.parametrize("sway", [None, -1.0], ids=["uniform", "sway"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", SDE_KINDS)
def test_states_have_the_moments_of_the_chain(kind: str, level: float, sway: float | None) -> None:
    """Within 4.5 standard errors of 60,000 samples at each of 16 states, deviations / sqrt(N) and / sqrt(2 N)."""
    t, shape = grid(16, sway), (60, 100, 10)
    states, _ = solve_sde(
        FLOW.velocity, normal(shape)(), t.float(), SDE(kind=kind, noise_level=level), normal(shape, 1), window=range(16)
    )
    count = math.prod(shape)
    for state, (mean, deviation) in zip(states, law(kind, level, t), strict=True):
        assert abs(state.mean().item() - mean) < 4.5 * deviation / count**0.5
        assert abs(state.std().item() - deviation) < 4.5 * deviation / (2 * count) ** 0.5


@pytest.mark.parametrize("sway", [None, -1.0], ids=["uniform", "sway"])
@pytest.mark.parametrize("level", [0.1, 0.7, 1.0, 2**0.5])
def test_exponential_steps_have_the_marginals_of_the_flow(level: float, sway: float | None) -> None:
    """At every time, with an error that halves with the step, at any noise: below 0.003 in 1024 steps."""

    def error(steps: int) -> float:
        t = grid(steps, sway)
        exact = [(float(time) * FLOW.mean, float(FLOW.scale(time))) for time in t]
        pairs = zip(law("exponential", level, t), exact, strict=True)
        return max(abs(got - want) for one, other in pairs for got, want in zip(one, other, strict=True))

    assert error(1024) < 0.003 and 1.8 < error(512) / error(1024) < 2.1


def test_what_the_other_steps_do_near_noise() -> None:
    """The claims of flow/sde.py: Euler-Maruyama overshoots in a sway grid however fine, Flow-CPS loses spread."""
    for steps in (64, 1024):
        t = grid(steps, -1.0)
        states = zip(law("flow_sde", 0.7, t), t, strict=True)
        over = max(deviation / float(FLOW.scale(time)) for (_, deviation), time in states)
        assert over == pytest.approx(1.24, abs=0.01)
        assert law("flow_cps", 0.7, t)[-1][1] < FLOW.deviation - 0.06


@pytest.mark.parametrize("kind", SDE_KINDS)
def test_only_the_window_is_random(kind: str) -> None:
    x0, t, window = normal((2, 5, 3))(), timesteps(8), range(2, 5)
    states, transitions = solve_sde(FLOW.velocity, x0, t, SDE(kind=kind), normal(x0.shape, 1), window=window)
    assert len(transitions) == 3 and len(states) == 9
    draws = normal(x0.shape, 1)
    for k, (x, after) in enumerate(pairwise(states)):
        if k in window:
            step = transitions[k - window.start]
            assert torch.equal(after, step.mean + step.std * draws())
        else:
            assert torch.equal(after, x + (t[k + 1] - t[k]) * FLOW.velocity(x, t[k]))


@pytest.mark.parametrize("kind", SDE_KINDS)
def test_frames_that_are_not_moved_follow_the_ode(kind: str) -> None:
    x0, t = normal((2, 5, 3))(), timesteps(8)
    moved = torch.tensor([[False, False, True, True, True], [False, True, True, True, True]])
    states, _ = solve_sde(FLOW.velocity, x0, t, SDE(kind=kind), normal(x0.shape, 1), window=range(7), moved=moved)
    ode = solve(FLOW.velocity, x0, t)[-1]
    assert torch.equal(states[-1][~moved], ode[~moved]) and not (states[-1][moved] == ode[moved]).any()


# Densities.


def test_log_prob_and_divergence_are_those_of_torch_distributions() -> None:
    x, mean, other = (normal((2, 5, 3), seed)() for seed in range(3))
    counted = torch.tensor([[False, True, True, True, True], [False, False, False, True, True]])
    transition = Transition(mean, torch.tensor(0.3))
    got, divergence = mean_log_prob(x, transition, counted), transition_kl(transition, other, counted)
    assert got.dtype == torch.float32
    for item in range(2):
        own = counted[item]
        want = Normal(mean[item, own], 0.3).log_prob(x[item, own]).mean()
        assert_close(got[item], want, rtol=1e-5, atol=1e-5)
        want = kl_divergence(Normal(mean[item, own], 0.3), Normal(other[item, own], 0.3)).mean()
        assert_close(divergence[item], want, rtol=1e-5, atol=1e-5)


def test_what_does_not_count_changes_nothing() -> None:
    x, mean, other = (normal((1, 5, 3), seed)() for seed in range(3))
    counted = torch.tensor([[False, True, True, True, False]])
    apart = [value + 7.0 * ~counted.unsqueeze(-1) for value in (x, mean, other)]
    std = torch.tensor(0.3)
    assert torch.equal(
        mean_log_prob(x, Transition(mean, std), counted), mean_log_prob(apart[0], Transition(apart[1], std), counted)
    )
    assert torch.equal(
        transition_kl(Transition(mean, std), other, counted),
        transition_kl(Transition(apart[1], std), apart[2], counted),
    )
    changed = x + counted.unsqueeze(-1)
    assert mean_log_prob(changed, Transition(mean, std), counted) != mean_log_prob(x, Transition(mean, std), counted)


# Rollouts of a speaking policy: three prompts of two total durations.


@pytest.mark.parametrize("kind", SDE_KINDS)
def test_a_rollout_without_noise_is_the_policys(kind: str) -> None:
    policy, prompts = tiny_policy(), tiny_prompts()
    options = dict(steps=5, generator=torch.Generator().manual_seed(3))
    plain = rollout(policy, prompts, grad_steps=0, **options)
    options["generator"] = torch.Generator().manual_seed(3)
    same, _ = sde_rollout(policy, prompts, sde=SDE(kind=kind, noise_level=0.0), window=range(1, 4), **options)
    assert torch.equal(same.mel, plain.mel) and torch.equal(same.lengths_frames, plain.lengths_frames)


@pytest.mark.parametrize("mixed", [False, True])
def test_each_item_is_what_it_would_be_alone_and_noise_differs(mixed: bool) -> None:
    policy, prompts = tiny_policy().train(), tiny_prompts(texts=["bad cab", "a fig", "bad cab"])
    prompts = replace(prompts, reference_texts=["feed me", "jam", "feed me"])
    prompts.reference_audio[2] = prompts.reference_audio[0]
    policy.mix_durations = mixed
    options = dict(sde=SDE(), window=range(1, 4), steps=5)
    spoken, trajectories = sde_rollout(policy, prompts, generator=torch.Generator().manual_seed(3), **options)
    rows_of = [trajectory.rows for trajectory in trajectories]
    assert policy.training and rows_of == ([[0, 2, 1]] if mixed else [[0, 2], [1]])
    assert not torch.allclose(spoken.mel[0], spoken.mel[2], atol=0.1), "one prompt twice: two different rollouts"
    states = trajectories[0].states
    assert (states[:, 0] - states[:, 1]).abs().mean() > 0.1

    for rows in ([0, 2], [1], [2]):
        own = item_generators(torch.Generator().manual_seed(3), 3)
        alone, again = sde_rollout(policy, prompts.select(rows), generator=[own[row] for row in rows], **options)
        log_probs = {
            row: trajectory.mean_log_probs[:, item]
            for trajectory in trajectories
            for item, row in enumerate(trajectory.rows)
        }
        for item, row in enumerate(rows):
            assert_close(again[0].mean_log_probs[:, item], log_probs[row], rtol=1e-5, atol=1e-5)
            frames = int(spoken.lengths_frames[row])
            assert_close(alone.mel[item, :frames], spoken.mel[row, :frames], rtol=1e-5, atol=1e-5)


def test_a_group_may_begin_at_one_noise() -> None:
    policy = tiny_policy()
    prompts = tiny_prompts(group_ids=torch.tensor([5, 2, 5]))
    for shared in (False, True):
        _, (pair, _) = sde_rollout(
            policy,
            prompts,
            sde=SDE(),
            window=range(0, 4),
            steps=5,
            shared_prior=shared,
            generator=torch.Generator().manual_seed(3),
        )
        assert torch.equal(pair.states[0, 0], pair.states[0, 1]) == shared
        assert not torch.equal(pair.states[1, 0], pair.states[1, 1])


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("kind", SDE_KINDS)
def test_a_replay_has_the_rollouts_probabilities_exactly(kind: str, guidance: float) -> None:
    policy, prompts = tiny_policy().train(), tiny_prompts()
    _, trajectories = sde_rollout(
        policy,
        prompts,
        sde=SDE(kind=kind),
        window=range(1, 4),
        steps=5,
        cfg_strength=guidance,
        generator=torch.Generator().manual_seed(3),
    )
    references = {0: 13, 1: 9, 2: 13}
    for trajectory in trajectories:
        transitions, counted = replay(policy, trajectory)
        assert counted.sum(-1).tolist() == [counted.shape[1] - references[row] for row in trajectory.rows]
        for k, (x, step) in enumerate(zip(trajectory.states[1:], transitions, strict=True)):
            assert step.mean.requires_grad and torch.equal(step.mean, trajectory.means[k])
            assert torch.equal(mean_log_prob(x, step, counted), trajectory.mean_log_probs[k])


def test_log_probs_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, trajectories = sde_rollout(tiny_policy(), tiny_prompts(), sde=SDE(), window=range(1, 4), steps=5)
    for values in (trajectories[0].states, trajectories[0].means, trajectories[0].mean_log_probs):
        assert values.dtype == torch.float32


def test_memory_of_a_replay_does_not_grow_with_the_window() -> None:
    policy, prompts = tiny_policy(), tiny_prompts().select([0, 2])

    def peak(window: range) -> int:
        _, (trajectory,) = sde_rollout(policy, prompts, sde=SDE(), window=window, steps=10)

        def backward() -> None:
            transitions, counted = replay(policy, trajectory)
            log_probs = [mean_log_prob(x, s, counted) for x, s in zip(trajectory.states[1:], transitions, strict=True)]
            torch.stack(log_probs).sum().backward()

        backward()  # gradients exist from here on
        return peak_bytes(backward)

    # A velocity's graph is some hundred times a state; what a step may add is a few states of 2 x 30 x 8 floats.
    state = 2 * 30 * 8 * 4
    assert peak(range(1, 9)) - peak(range(1, 3)) < 6 * 12 * state
