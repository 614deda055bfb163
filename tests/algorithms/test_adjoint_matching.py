"""Adjoint Matching: the SDE forgets its noise, the adjoint is as derived, training reaches the tilted distribution."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import FLOW, REFERENCE, GaussianPolicy, MelReward, pipeline, prompts
from peft import LoraConfig
from problems import tiny_policy, tiny_prompts
from small_runs import metrics, same_weights, trainer, write_dataset
from torch import Tensor

from rlhf_mel.algorithms.adjoint_matching import (
    AdjointMatching,
    AdjointTargets,
    adjoint_matching_loss,
    control_scales,
    shortened,
)
from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.flow.ode import timesteps
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.flow.sde import SDE
from rlhf_mel.flow.sde_rollout import Trajectory
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.types import Audio, Prompts

BETA, SCALE = 0.8, 1.5
NAN = float("nan")


def matching(**options: Any) -> AdjointMatching:
    """Without the limit, which theory knows nothing of."""
    return AdjointMatching(AdjointMatching.Config(**{"max_push": None, **options}), beta=BETA)


def collect(
    policy: GaussianPolicy, reward: MelReward, batch: int = 4, **options: Any
) -> tuple[Pipeline, AdjointTargets]:
    parts = pipeline(policy, reward, anchored=True)
    return parts, matching(**options).collect(parts, prompts(batch), torch.Generator().manual_seed(0))


# The memoryless SDE.


def test_a_sound_that_is_cut_off_from_the_mel_is_refused() -> None:
    class OfSound(MelReward):
        """Of the silence of a vocoder that reads no mel."""

        def score(self, audio: Audio, prompts: Prompts) -> Tensor:
            return audio.waveform.sum(1)

    with pytest.raises(ValueError, match="expected rewards with a gradient at the mel"):
        collect(GaussianPolicy(8), OfSound(domain="waveform"))


def test_the_end_does_not_remember_the_beginning() -> None:
    """Correlation of 12,000 pairs: 0 within 4.5 / sqrt(12000) = 0.041 by the SDE, 1 by the ODE."""
    remembered = []
    for noise_level in (math.sqrt(2), 0.0):
        spoken, (trajectory,) = pipeline(GaussianPolicy(16), MelReward()).sde_rollout(
            prompts(4000), torch.Generator().manual_seed(0), sde=SDE(noise_level=noise_level), window=range(15)
        )
        pairs = torch.stack([trajectory.states[0][:, REFERENCE:, 0].flatten(), spoken.mel[..., 0].flatten()])
        remembered.append(torch.corrcoef(pairs)[0, 1].item())
    assert abs(remembered[0]) < 0.041
    assert remembered[1] == pytest.approx(1.0, abs=1e-4)


def test_the_marginals_are_those_of_the_flow() -> None:
    """x_t ~ N(t m, s_t^2): 12,000 values within 4.5 standard errors and the integrator's own error, of order 1 / K.

    The step holds x_1 fixed, which loses 3 % of the deviation at K = 128 and half of that at 256.
    """
    steps = 128
    policy = GaussianPolicy(steps)
    _, (trajectory,) = pipeline(policy, MelReward()).sde_rollout(
        prompts(2000), torch.Generator().manual_seed(0), sde=SDE(noise_level=math.sqrt(2)), window=range(steps - 1)
    )
    for k in (1, steps // 4, steps // 2, steps - 1):
        values, t = trajectory.states[k][:, REFERENCE:], policy.grid[k]
        deviation = FLOW.scale(t).item()
        assert values.mean().item() == pytest.approx(t.item() * FLOW.mean, abs=4.5 * deviation / 12_000**0.5 + 0.005)
        assert values.std().item() == pytest.approx(deviation, rel=4.5 / 24_000**0.5 + 0.03)


# The adjoint.


@pytest.mark.parametrize("grid", ["uniform", "sway"])
def test_the_lean_adjoint_of_a_linear_flow(grid: str) -> None:
    """dg/dt = -(2 slope - 1 / t) g with slope = s'/s has the solution g(t) = g(1) d^2 t / s_t^2: d E[x_1 | x_t] / dx_t.

    c g = (1 - t) / t g is then (1 - t) d^2 / s_t^2 scale / beta, on every grid: the means of the steps telescope.
    """
    steps = 16
    t = timesteps(steps, use_epss=False, sway_sampling_coef=-1.0 if grid == "sway" else None)
    _, collected = collect(GaussianPolicy(steps, grid=t), MelReward(SCALE))
    (targets,) = collected.targets
    want = (1 - t[1:-1]) * FLOW.deviation**2 / FLOW.scale(t[1:-1]) ** 2 * SCALE / BETA
    push = targets.push[1:, :, REFERENCE:]
    torch.testing.assert_close(push, want[:, None, None, None].expand_as(push), rtol=2e-4, atol=1e-6)
    assert (targets.push[:, :, :REFERENCE] == 0).all(), "the reward does not hear the reference clip"
    # First step: c g = (1 - t')^2 / t' g(t'), against the limit d^2 scale / beta
    end = t[1]
    first = (1 - end) ** 2 * FLOW.deviation**2 / FLOW.scale(end) ** 2 * SCALE / BETA
    assert targets.push[0, 0, REFERENCE, 0].item() == pytest.approx(float(first), rel=1e-3)
    assert float(first) == pytest.approx(FLOW.deviation**2 * SCALE / BETA, rel=0.01)


def test_the_adjoint_of_the_ode() -> None:
    """g(t) = g(1) d / s_t, and u_k = g_{k+1}."""
    steps = 8
    policy = GaussianPolicy(steps, exact=True)
    _, collected = collect(policy, MelReward(SCALE), dynamics="ode")
    want = FLOW.deviation / FLOW.scale(policy.grid[1:]) * SCALE / BETA
    push = collected.targets[0].push[:, :, REFERENCE:]
    torch.testing.assert_close(push, want[:, None, None, None].expand_as(push), rtol=1e-4, atol=1e-6)


class Louder(GaussianPolicy):
    """Its mel is twice the end of the flow."""

    def finalize(self, x1: Tensor, cond: Any) -> Tensor:
        return 2 * x1


def test_the_adjoint_begins_before_the_mel_is_finalized() -> None:
    _, plain = collect(GaussianPolicy(5), MelReward(SCALE))
    _, louder = collect(Louder(5), MelReward(SCALE))
    torch.testing.assert_close(louder.targets[0].push, 2 * plain.targets[0].push)


def speech_pipeline(dynamics: str) -> tuple[Pipeline, AdjointMatching]:
    parts = pipeline(GaussianPolicy(4), MelReward(0.7, target=0.1))
    policy = tiny_policy()
    sampling = Sampling(steps=4, cfg_strength=1.5)
    return (
        dataclasses.replace(parts, policy=policy, reference=ReferencePolicy(policy), sampling=sampling),
        matching(dynamics=dynamics),
    )


@pytest.mark.parametrize("dynamics", ["memoryless", "ode"])
def test_the_adjoint_is_the_gradient_of_the_chain_and_each_item_is_what_it_is_alone(dynamics: str) -> None:
    """Where policy and reference are one: d r(x_1) / d x_k / beta by autograd through the rest of that item's chain."""
    parts, algorithm = speech_pipeline(dynamics)
    policy, own, steps = parts.policy, tiny_prompts(), 4
    collected = algorithm.collect(parts, own, torch.Generator().manual_seed(1))
    loss, metrics = algorithm.loss(parts, collected, torch.Generator())
    assert (metrics["anchor"] == 0).all()
    policy.eval()  # type: ignore[attr-defined]
    item_losses = torch.zeros(3)
    for targets in collected.targets:
        c, weights = control_scales(targets.trajectory.t, algorithm.config.dynamics)
        for (item, row), k in itertools.product(enumerate(targets.trajectory.rows), range(steps)):
            with torch.no_grad():
                cond = policy.encode(own.select([row]), cfg_strength=1.5)
            at = k + 1 if dynamics == "ode" else max(k, 1)
            want = c[k] * chain_gradient(policy, cond, targets.trajectory, item, at)
            assert not targets.push[k, item, len(want) :].any(), "padding"
            torch.testing.assert_close(targets.push[k, item, : len(want)], want, rtol=1e-3, atol=1e-4)
            item_losses[row] += weights[k] * want[cond.generated[0]].square().mean()
    torch.testing.assert_close(loss.detach(), item_losses.mean(), rtol=1e-3, atol=1e-5)
    assert item_losses.min() > 0.01


def chain_gradient(policy: Any, cond: Any, trajectory: Trajectory, item: int, at: int) -> Tensor:
    """Gradient [T, M] of the reward over beta by the state before step `at`, the noise of later steps as it was."""
    steps, own = len(trajectory.t) - 1, cond.generated.shape[1]
    visited = trajectory.states[:, item, None, :own]
    states = [*visited, step(policy, cond, trajectory, visited[-1], 3)]
    x = y = states[at].detach().clone().requires_grad_()
    for j in range(at, steps):
        y = step(policy, cond, trajectory, y, j)
        if j < steps - 1:
            y = y + (trajectory.states[j + 1, item] - trajectory.means[j, item])[:own]
    mel = policy.finalize(y, cond)[0, cond.generated[0]]
    (gradient,) = torch.autograd.grad(-0.7 * (mel - 0.1).square().sum() / 2 / BETA, x)
    return gradient[0]


def step(policy: Any, cond: Any, trajectory: Trajectory, x: Tensor, k: int) -> Tensor:
    v = policy.velocity(x, trajectory.t[k], cond)
    return trajectory.sde.transition(x, v, trajectory.t, k, cond.generated).mean


# The loss.


def test_scales_by_hand() -> None:
    t = torch.tensor([0.0, 0.2, 0.5, 1.0])
    c, weights = control_scales(t, "memoryless")
    # (1 - 0.2)^2 / 0.2; 0.8 / 0.2; 0.5 / 0.5, and dt / c
    assert c.tolist() == pytest.approx([3.2, 4.0, 1.0])
    assert weights.tolist() == pytest.approx([0.2 / 3.2, 0.3 / 4.0, 0.5])
    c, weights = control_scales(t, "ode")
    assert c.tolist() == [1.0, 1.0, 1.0] and weights.tolist() == pytest.approx([0.1, 0.15, 0.25])


def test_the_loss_on_three_numbers_by_hand() -> None:
    """Frame 0 does not count. Step 1: (1 - 0.5 - 1)^2, (2 - 1)^2; step 2: (3 - 2 - 1)^2, (1 - 3)^2."""
    column = [[9.0, 1.0, 2.0], [9.0, 3.0, 1.0]], [[0.0, 0.5, 1.0], [0.0, 2.0, 3.0]], [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    v, base, push = (torch.tensor(values).reshape(2, 1, 3, 1) for values in column)
    weights, counted = torch.tensor([2.0, 0.5]), torch.tensor([[False, True, True]])
    # 2 (0.25 + 1) / 2 + 0.5 (0 + 4) / 2
    assert adjoint_matching_loss(v - base, push, weights, counted).tolist() == pytest.approx([2.25])


def test_a_push_beyond_the_limit_is_shortened_by_hand() -> None:
    """Frame 0 does not count. Steps of root mean square 5 (of 5 and 5) and 0.5, limit 2; counted for each item."""
    push = torch.tensor([[9.0, 5.0, -5.0], [9.0, 0.5, 0.5]]).reshape(2, 1, 3, 1)
    counted = torch.tensor([[False, True, True]])
    got, longer = shortened(push, counted, 2.0)
    assert got[:, 0, 1:, 0].tolist() == [[2.0, -2.0], [0.5, 0.5]]
    assert longer.tolist() == [[True], [False]]
    assert torch.equal(shortened(push, counted, None)[0], push)

    parts, _ = collect(GaussianPolicy(5), MelReward(SCALE))
    algorithm = matching(max_push=0.4)
    collected = algorithm.collect(parts, prompts(2), torch.Generator().manual_seed(0))
    (targets,) = collected.targets
    # (1 - t) d^2 / s_t^2 * 1.5 / 0.8 is 0.371, 0.467, 0.551, 0.421 at t = 0.2 ... 0.8; before: (0.8^2 / 0.2) g(0.2)
    assert targets.push[..., REFERENCE:, :].amax((1, 2, 3)).tolist() == pytest.approx(
        [0.297, 0.371, 0.4, 0.4, 0.4], abs=1e-3
    )
    metrics = algorithm.loss(parts, collected, torch.Generator())[1]
    assert metrics["shortened_push"].tolist() == pytest.approx([0.6, 0.6])


def test_a_subset_of_the_steps_has_the_loss_of_all_on_average() -> None:
    """A linear reward has one adjoint for all paths, so the loss of one step is a number: their mean is that of all."""
    parts, collected = collect(GaussianPolicy(5), MelReward(SCALE))
    whole = matching().loss(parts, collected, torch.Generator())[0].item()
    each = {}
    for seed in range(40):
        one = matching(num_train_steps=1)
        drawn = one.collect(parts, prompts(4), torch.Generator().manual_seed(seed))
        each[drawn.targets[0].steps[0]] = one.loss(parts, drawn, torch.Generator())[0].item()
    assert sorted(each) == [0, 1, 2, 3, 4]
    assert sum(each.values()) / 5 == pytest.approx(whole, rel=1e-4)


def test_only_the_last_steps_are_trained() -> None:
    parts, collected = collect(GaussianPolicy(8), MelReward(SCALE), dynamics="ode", last_steps=3)
    assert list(collected.targets[0].steps) == [5, 6, 7]
    matching(dynamics="ode", last_steps=3).loss(parts, collected, torch.Generator())[0].backward()
    grad = parts.policy.shift.grad
    assert (grad[:5] == 0).all() and (grad[5:] < 0).all()
    _, all_steps = collect(GaussianPolicy(8), MelReward(SCALE), dynamics="ode")
    torch.testing.assert_close(collected.targets[0].push, all_steps.targets[0].push[5:])


@dataclass
class BrokenRow(MelReward):
    """Row 0: no score; a score whose gradient is NaN; or one so steep that the adjoint is infinite."""

    what: str = "score"

    def score(self, audio: Any, p: Any) -> Tensor:
        scores = super().score(audio, p)
        first, total = scores[:1], audio.mel[0].sum()
        broken = {
            "score": first + NAN,
            "gradient": first + 0 * (first - first.detach()).sqrt(),
            "adjoint": first + 3e38 * (total - total.detach()),  # over beta = 0.8 that is more than float32 holds
        }
        return torch.cat([broken[self.what], scores[1:]])


@pytest.mark.parametrize("what", ["score", "gradient", "adjoint"])
def test_a_row_without_score_gradient_or_adjoint_is_dropped_and_counted(what: str) -> None:
    """A policy that has moved by 0.3 since would be drawn back to the reference by a row that counted."""
    parts, collected = collect(GaussianPolicy(5), BrokenRow(2.0, target=0.0, what=what), batch=3)
    with torch.no_grad():
        parts.policy.shift += 0.3  # type: ignore[attr-defined]
    loss, metrics = matching().loss(parts, collected, torch.Generator())
    loss.backward()
    assert metrics["dropped_rollouts"].tolist() == [True, False, False]
    assert parts.policy.shift.grad.isfinite().all()  # type: ignore[attr-defined]

    _, whole = collect(GaussianPolicy(5), MelReward(2.0, target=0.0), batch=3)
    push = whole.targets[0].push[:, [1, 2]]
    counted = torch.tensor([[False] * REFERENCE + [True] * 3] * 2)
    want = adjoint_matching_loss(torch.full_like(push, 0.3), push, whole.targets[0].weights, counted).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)


# Training to known optima.


def train(algorithm: AdjointMatching, parts: Pipeline, batch: int, updates: int, rate: float = 0.05) -> None:
    """Adam, its rate falling to 0; a batch is used for ten updates, as num_iterations does."""
    policy, generator = parts.policy, torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate, betas=(0.8, 0.95))  # type: ignore[attr-defined]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / updates)
    algorithm.check(parts)
    for update in range(updates):
        if update % 10 == 0:
            collected = algorithm.collect(parts, prompts(batch), generator)
        optimizer.zero_grad()
        algorithm.loss(parts, collected, generator)[0].backward()
        optimizer.step()
        schedule.step()


def test_a_linear_reward_moves_the_mean_to_that_of_the_tilted_distribution() -> None:
    """p* ~ N(m, d^2) exp(k x / beta) = N(m + k d^2 / beta, d^2): by the ODE that was never sampled, within 0.5 %."""
    policy = GaussianPolicy(8, train_slope=False)
    before = policy.end_moments()
    train(matching(), pipeline(policy, MelReward(SCALE), anchored=True), batch=2, updates=300)
    after = policy.end_moments()
    assert after[0] - before[0] == pytest.approx(FLOW.tilted(BETA, slope=SCALE).mean - FLOW.mean, rel=0.005)


def test_a_quadratic_reward_is_reached_in_mean_and_deviation() -> None:
    """p* ~ N(m, d^2) exp(-k (x - c)^2 / (2 beta)), as problems.py has it.

    Its flow is Gaussian, too: Euler's steps along that flow's own velocity are what training is to reach. Within 0.02
    of the 0.21 that the mean moves and 4 % in the deviation: the chain's Jacobians are off by order 1 / K.
    """
    k, c, steps = 4.0, 0.2, 24
    policy = GaussianPolicy(steps)
    train(matching(), pipeline(policy, MelReward(k, target=c), anchored=True), batch=128, updates=300)
    tilted = FLOW.tilted(BETA, curvature=k, target=c)
    mean, deviation = 0.0, 1.0
    for start, end in zip(policy.grid[:-1], policy.grid[1:], strict=True):
        at = tilted.velocity(torch.tensor([0.0, 1.0]), start)
        factor = 1 + float((end - start) * (at[1] - at[0]))
        mean, deviation = factor * mean + float((end - start) * at[0]), factor * deviation
    got = policy.end_moments()
    assert abs(tilted.mean - FLOW.mean) > 0.2 and tilted.deviation < 0.75 * FLOW.deviation
    assert got[0] == pytest.approx(mean, abs=0.02)
    assert got[1] == pytest.approx(deviation, rel=0.04)
    assert got[0] == pytest.approx(tilted.mean, abs=0.02)


def test_the_ode_reaches_the_optimum_of_its_own_objective() -> None:
    """u = g = (k / beta) d / s_t moves x_1 by int d / s_t u dt = k d^2 / beta int dt / s_t^2 = (k d / beta) pi / 2,

    since int_0^1 dt / ((1 - t)^2 + t^2 d^2) = pi / (2 d). With 32 steps: the sum in place of the integral, and 3 %.
    """
    steps = 32
    policy = GaussianPolicy(steps, exact=True, train_slope=False)
    before = policy.end_moments()[0]
    train(matching(dynamics="ode"), pipeline(policy, MelReward(SCALE), anchored=True), batch=2, updates=300, rate=0.1)
    moved = policy.end_moments()[0] - before
    left = FLOW.deviation / FLOW.scale(policy.grid[1:])
    exact = (policy.grid.diff() * left.square()).sum().item() * SCALE / BETA
    assert moved == pytest.approx(exact, rel=0.003)
    assert moved == pytest.approx(SCALE * FLOW.deviation / BETA * math.pi / 2, rel=0.03)


# Through the trainer.


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["adjoint_matching", "alignprop", "draft_lv"])
def test_it_trains_and_resumes_to_the_bit(tmp_path: Path, name: str, lora: bool) -> None:
    """Two updates from one batch; with LoRA the reference is the policy with its adapters off."""
    options: dict[str, Any] = dict(algorithm=name, num_iterations=2, max_steps=4, save_steps=2, save_total_limit=None)
    peft = LoraConfig(r=2) if lora else None
    own = write_dataset(tmp_path)
    whole = trainer(tmp_path, own, peft=peft, **options)
    whole.train()
    uninterrupted = metrics(tmp_path)
    assert uninterrupted[0]["anchor"] == 0 < uninterrupted[-1]["anchor"]
    assert all(line["grad_norm"] > 0 for line in uninterrupted if "grad_norm" in line)
    resumed = trainer(tmp_path, own, peft=peft, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert metrics(tmp_path) == uninterrupted
    assert same_weights(resumed.policy, whole.policy)


# What it refuses.


def test_what_cannot_be_is_refused() -> None:
    policy = GaussianPolicy(4)
    with pytest.raises(ValueError, match=r"'adjoint_matching' follows the gradient.*reward 'mel' without a gradient"):
        matching().check(pipeline(policy, MelReward(differentiable=False), anchored=True))
    with pytest.raises(ValueError, match=r"expected beta above 0, got 0\.0; set --beta"):
        load_algorithm("adjoint_matching").check(pipeline(policy, MelReward()))
    parts = pipeline(policy, MelReward(), anchored=True)
    with pytest.raises(ValueError, match="expected --solver euler, got 'midpoint'"):
        matching().check(dataclasses.replace(parts, sampling=Sampling(steps=4, method="midpoint")))
    for options in ({"last_steps": 5}, {"num_train_steps": 3, "last_steps": 2}):
        with pytest.raises(ValueError, match="expected num_train_steps <= last_steps <= sampling_steps"):
            matching(**options).check(parts)
    with pytest.raises(ValueError, match="expected one of \\['memoryless', 'ode'\\], got 'sde'"):
        matching(dynamics="sde")
    with pytest.raises(ValueError, match="max_push of adjoint_matching: expected above 0, or null for no limit, got 0"):
        matching(max_push=0)
    with pytest.raises(ValueError, match="num_train_steps of adjoint_matching: expected a whole number"):
        matching(num_train_steps=0)
    matching(last_steps=2, num_train_steps=1).check(parts)
    assert AdjointMatching.default_beta == 0.01
