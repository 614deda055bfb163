"""The core of the forward-process family: what is drawn, what counts, and that an item is what it is alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forward_problems import (
    GENERATED,
    MELS,
    REFERENCE,
    Movable,
    draw,
    pipeline,
    prompts,
    slope,
    time_mean,
    variance,
)
from peft import LoraConfig
from problems import MelReward, Silent, tiny_policy, tiny_prompts
from small_runs import metrics, quietness, same_weights, trainer, write_dataset
from torch import Tensor

from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.algorithms.families.forward_process import (
    Draw,
    ForwardProcessOptions,
    collect_samples,
    draw_times,
    regress,
)
from rlhf_mel.algorithms.ram import ram_target
from rlhf_mel.flow.noise import item_generators
from rlhf_mel.flow.policy import rollout
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.masked import kept_mean
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.training.config import RLHFConfig

NAMES = ("orw_cfm", "diffusion_nft", "awm", "ram")
NAN = float("nan")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matching(draw: Draw) -> dict[str, Tensor]:
    return {"loss": draw.mse(draw.velocity, draw.target)}


def speaking(cfg_strength: float = 0.0) -> tuple[Any, Pipeline]:
    """A small DiT, and prompts of two durations around it."""
    policy = tiny_policy()
    parts = Pipeline(
        policy=policy,
        vocoder=Silent(),
        rewards=Rewards([MelReward()]),  # type: ignore[list-item]
        reference=ReferencePolicy(policy),
        sampling=Sampling(steps=3, cfg_strength=cfg_strength),
    )
    return policy, parts


def test_the_moments_that_the_method_rests_on() -> None:
    """E[u - v | t] = 0 and E[sum x_1 (u - v) | t] = D^2 g(t): 60,000 samples of time and noise, 4.5 standard errors."""
    policy, batch = Movable(0.3), 2000
    samples = collect_samples(
        pipeline(policy), prompts(batch), generator(), ForwardProcessOptions(scale_rewards="none")
    )
    generated = samples.rollouts.mel
    assert generated.mean().item() == pytest.approx(policy.flow.mean + 0.3, abs=0.03)
    assert generated.var().item() == pytest.approx(variance(), rel=0.06)
    moments: dict[str, list[Tensor]] = {"residual": [], "covariance": []}

    def objective(draw: Draw) -> dict[str, Tensor]:
        residual = (draw.target - draw.velocity)[:, REFERENCE:]
        reward = samples.rollouts.mel[draw.rows].sum((1, 2)) - GENERATED * MELS * (policy.flow.mean + 0.3)
        push = 1 - draw.t * slope(draw.t)
        moments["residual"].append(residual.mean((1, 2)))
        moments["covariance"].append(reward * residual.mean((1, 2)) - variance() * push)
        return {}

    regress(policy, samples, objective, ForwardProcessOptions(num_noise_samples=30), generator(1))
    for values in moments.values():
        error = torch.stack(values).mean(0).std().item() / batch**0.5  # draws of one sample are not independent
        assert abs(torch.stack(values).mean().item()) < 4.5 * error < 0.08
    assert variance() * time_mean(0.0) > 0.4, "so that 0.08 is small"


def test_the_loss_is_flow_matching_at_the_drawn_points() -> None:
    """Each item and draw alone, with the item's generator: times, then noise; reference frames known, never counted."""
    policy, parts = speaking(cfg_strength=1.5)
    own, n = tiny_prompts(group_ids=torch.zeros(3, dtype=torch.long)), 3
    options = ForwardProcessOptions(num_noise_samples=n)
    samples = collect_samples(parts, own, generator(), options)
    got = regress(policy.train(), samples, matching, options, generator(7))["loss"]
    assert policy.training and got.shape == (3,)
    policy.eval()
    generators = item_generators(generator(7), 3)
    assert generators is not None
    for row in range(3):
        cond = policy.encode(own.select([row]), cfg_strength=1.5)
        uniform = torch.rand(n, generator=generators[row])
        x1 = torch.where(cond.kept[..., None], cond.reference, 0.0)
        length = int(samples.rollouts.lengths_frames[row])
        x1[0, -length:] = samples.rollouts.mel[row, :length]
        losses = []
        for k in range(n):
            t = (k + uniform[k]) / n
            x0 = torch.randn(x1.shape[1:], generator=generators[row])
            v = policy.velocity((1 - t) * x0 + t * x1, t[None], cond)
            losses.append((v - (x1 - x0))[0, -length:].square().mean())
        torch.testing.assert_close(got[row], torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_items_alone(name: str) -> None:
    """Loss values and gradient of three items of two durations, to rounding."""
    policy, parts = speaking()
    own = tiny_prompts(group_ids=torch.zeros(3, dtype=torch.long))
    samples = collect_samples(parts, own, generator(), ForwardProcessOptions())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.02)  # no longer the reference
    algorithm: Any = load_algorithm(name, {}, beta=0.5)
    extra: dict[str, Any] = {} if name == "orw_cfm" else {"old": parts.reference}

    def objective(draw: Draw) -> dict[str, Tensor]:
        if name == "awm":
            return algorithm._values(draw, old_log_probs=None, log_probs=torch.zeros(8, 3))
        return algorithm._values(draw)

    def run(samples: Any, noise: Any) -> tuple[dict[str, Tensor], Tensor]:
        others: dict[str, Any] = {"reference": parts.reference, **extra}
        values = regress(policy, samples, objective, algorithm.config, noise, **others)
        policy.zero_grad()
        next(iter(values.values())).sum().backward()
        return values, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    together, gradient = run(samples, item_generators(generator(3), 3))
    noise, gradients = item_generators(generator(3), 3), []
    assert noise is not None and gradient.norm() > 1e-3
    for row in range(3):
        rollouts = samples.rollouts
        length = int(rollouts.lengths_frames[row])
        alone = replace(
            samples,
            prompts=samples.prompts.select([row]),
            rollouts=replace(rollouts, mel=rollouts.mel[[row], :length], lengths_frames=rollouts.lengths_frames[[row]]),
            advantages=samples.advantages[[row]],
            group_ids=samples.group_ids[[row]],
            dropped=samples.dropped[[row]],
        )
        values, grad = run(alone, [noise[row]])
        gradients.append(grad)
        for key, value in values.items():
            torch.testing.assert_close(value[0], together[key][row], rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(sum(gradients), gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_reference_frames_change_nothing(name: str) -> None:
    """`Movable` has no attention: what stands in frames that do not count must reach neither loss nor gradient."""
    policy = Movable(0.1)
    parts = pipeline(policy)
    own = replace(prompts(8, 4), durations_frames=REFERENCE + torch.tensor([3, 2, 3, 2, 3, 2, 2, 3]))
    with torch.no_grad():
        collected = load_algorithm(name, {"num_noise_samples": 2}, beta=0.5).collect(parts, own, generator())
        policy.theta += 0.2
    samples = collected if name == "orw_cfm" else collected.samples

    def run(samples: Any, pasted: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        algorithm = load_algorithm(name, {"num_noise_samples": 2}, beta=0.5)
        policy.pasted, policy.theta.grad = pasted, None
        changed: Any = samples if name == "orw_cfm" else replace(collected, samples=samples)
        loss, metrics = algorithm.loss(parts, changed, generator(2))
        loss.backward()
        return loss.detach(), policy.theta.grad, metrics

    want = run(samples, 3.0)
    outside = torch.arange(3) >= samples.rollouts.lengths_frames[:, None]
    assert outside.any() and (samples.rollouts.mel[outside] == 0).all()
    padded = replace(samples.rollouts, mel=samples.rollouts.mel.masked_fill(outside[..., None], 50.0))
    got = run(replace(samples, rollouts=padded), -70.0)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert all(torch.equal(got[2][key], want[2][key]) for key in want[2])
    counted = replace(samples.rollouts, mel=samples.rollouts.mel + 1.0)
    assert not torch.equal(run(replace(samples, rollouts=counted), 3.0)[0], want[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_rollout_without_a_reward_is_dropped_and_counted(name: str) -> None:
    """Its mel must not matter where there is no anchor; RAM, which has one always, pulls it to the reference only."""

    def listener(completions: list, **columns: object) -> list[float | None]:
        return [1.0, None, 3.0, 2.0]

    policy = Movable(0.1)
    parts = pipeline(policy, listener, anchored=name == "ram")
    beta = 0.5 if name == "ram" else 0.0
    algorithm = load_algorithm(name, {"scale_rewards": "none"}, beta=beta)
    with torch.no_grad():
        collected = algorithm.collect(parts, prompts(4, 4), generator())
    samples = collected if name == "orw_cfm" else collected.samples
    assert samples.advantages.tolist() == [-1.0, 0.0, 1.0, 0.0]
    assert samples.dropped.tolist() == [False, True, False, False]

    def run(samples: Any) -> tuple[Tensor, Tensor]:
        policy.theta.grad = None
        changed = samples if name == "orw_cfm" else replace(collected, samples=samples)
        loss, metrics = algorithm.loss(parts, changed, generator(1))
        loss.backward()
        assert metrics["dropped_rollouts"].tolist() == [False, True, False, False]
        return loss.detach(), policy.theta.grad

    mel = samples.rollouts.mel.clone()
    mel[1] += 5.0
    want, got = run(samples), run(replace(samples, rollouts=replace(samples.rollouts, mel=mel)))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and want[1].abs() > 1e-2
    if name in ("awm", "diffusion_nft"):  # its advantage is 0: leaving it out is a mean over 3 instead of 4
        counted = run(replace(samples, dropped=torch.zeros(4, dtype=torch.bool)))
        torch.testing.assert_close(counted[1] * 4 / 3, want[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_black_box_reward_moves_a_real_policy(name: str) -> None:
    def loudness(completions: list, **columns: object) -> list[float]:
        return [float(n) for n in range(len(completions))]

    policy, parts = speaking(cfg_strength=2.0)
    parts = replace(parts, rewards=Rewards([loudness]))
    algorithm = load_algorithm(name, {}, beta=0.1)
    algorithm.check(parts)
    with torch.no_grad():
        collected = algorithm.collect(parts, tiny_prompts(group_ids=torch.zeros(3, dtype=torch.long)), generator())
    for seed in (1, 2):  # num_iterations = 2
        loss, metrics = algorithm.loss(parts, collected, generator(seed))
        loss.backward()
        algorithm.on_update(parts)
    assert metrics["reward"].tolist() == [0.0, 1.0, 2.0] and metrics["frac_reward_zero_std"] == 0
    assert (metrics["anchor"] == 0).all(), "the reference is the policy before training"
    assert max(p.grad.abs().max() for p in policy.parameters() if p.grad is not None) > 1e-4


@pytest.mark.parametrize(
    ("name", "options", "guidance"),
    [("orw_cfm", {}, 1.5), ("awm", {}, 1.5), ("diffusion_nft", {"loss_cfg_strength": 0.5}, 0.5), ("ram", {}, 0.0)],
)
def test_the_guidance_of_the_regressed_velocity(
    name: str, options: dict[str, Any], guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    encode = Movable.encode

    def watched(self: Movable, prompts: Any, *, cfg_strength: float = 2.0) -> Any:
        seen.append(cfg_strength)
        return encode(self, prompts, cfg_strength=cfg_strength)

    monkeypatch.setattr(Movable, "encode", watched)
    parts = pipeline(Movable(), cfg_strength=1.5)
    algorithm = load_algorithm(name, options, beta=0.5)
    collected = algorithm.collect(parts, prompts(4, 4), generator())
    assert set(seen) == {1.5}
    seen.clear()
    algorithm.loss(parts, collected, generator())
    assert set(seen) == {guidance}


def test_rollouts_are_the_plain_ones() -> None:
    _, parts = speaking()
    samples = collect_samples(parts, tiny_prompts(), generator(4), ForwardProcessOptions())
    want = rollout(parts.policy, tiny_prompts(), steps=3, cfg_strength=0.0, grad_steps=0, generator=generator(4))
    assert torch.equal(samples.rollouts.mel, want.mel) and not samples.rollouts.mel.requires_grad
    assert samples.advantages.tolist() == [0.0, 0.0, 0.0], "without group ids there is nothing to compare"


def test_advantages_are_clipped_and_compared_within_groups_or_the_batch() -> None:
    def far(completions: list, **columns: object) -> list[float]:
        return [0.0, 2.0, 10.0, 40.0]

    parts = pipeline(Movable(), far, anchored=False)
    options = ForwardProcessOptions(scale_rewards="none", advantage_clip=5.0)
    within = collect_samples(parts, prompts(4, 2), generator(), options)
    assert within.advantages.tolist() == [-1.0, 1.0, -5.0, 5.0] and within.group_ids.tolist() == [0, 0, 1, 1]
    across = collect_samples(parts, prompts(4, 2), generator(), options, across_groups=True)  # mean 13
    assert across.advantages.tolist() == [-5.0, -5.0, -3.0, 5.0] and across.group_ids.tolist() == [0, 0, 0, 0]


def test_times_are_stratified_and_follow_their_density() -> None:
    options = ForwardProcessOptions(num_noise_samples=4, time_power=1.0)
    times = draw_times(20_000, options, None)
    probability = 1 - (1 - times) ** 2  # of a time below: int_0^t 2 (1 - s) ds
    for k in range(4):
        assert ((probability[k] >= k / 4 - 1e-6) & (probability[k] <= (k + 1) / 4 + 1e-6)).all()
    assert times.mean().item() == pytest.approx(1 / 3, abs=0.003)  # int_0^1 t 2 (1 - t) dt
    uniform = draw_times(20_000, ForwardProcessOptions(num_noise_samples=1), None)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01) and uniform.std().item() == pytest.approx(
        12**-0.5, abs=0.01
    )


def test_means_by_hand() -> None:
    one = draw([1.0, 5.0, 2.0], [0.0, 0.0, 4.0], counted=[True, False, True])
    assert one.mse(one.velocity, one.target).item() == (1 + 4) / 2
    assert kept_mean(torch.tensor([1.0, NAN, 3.0]), torch.tensor([False, True, False])).item() == 2
    assert kept_mean(torch.tensor([NAN]), torch.tensor([True])).item() == 0
    # 2 + 0.5 / 0.25 (3 - 1)
    assert ram_target(draw([0.0], [3.0], advantage=0.5, old=[1.0], reference=[2.0]), 0.25).item() == 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_noise_samples": 0}, "num_noise_samples of NAME: expected a whole number of at least 1, got 0"),
        ({"time_power": -0.5}, "time_power of NAME: expected a number of at least 0, got -0.5"),
        ({"loss_cfg_strength": -1.0}, "loss_cfg_strength of NAME: expected a number of at least 0, got -1.0"),
        ({"advantage_clip": 0.0}, "advantage_clip of NAME: expected a number above 0, got 0.0"),
        ({"scale_rewards": "median"}, "scale_rewards of NAME: expected one of"),
        ({"draws": 3}, "unknown option 'draws' of algorithm 'NAME'"),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("NAME", name)):
        load_algorithm(name, options)


def test_the_run_hands_its_options_to_the_family() -> None:
    options: dict[str, Any] = dict(num_generations=2, per_device_train_batch_size=4, use_cpu=True, report_to="none")
    assert RLHFConfig(algorithm="ram", **options).beta == 0.01
    config = RLHFConfig(algorithm="awm", epsilon=0.5, scale_rewards="group", **options)
    assert config.algorithm_options == {"epsilon": 0.5, "scale_rewards": "group"}
    with pytest.raises(ValueError, match="compares rollouts of one prompt"):
        RLHFConfig(algorithm="diffusion_nft", use_cpu=True)
    with pytest.raises(ValueError, match="unknown option 'epsilon' of algorithm 'ram'"):
        RLHFConfig(algorithm="ram", epsilon=0.5, **options)


@pytest.mark.parametrize(("name", "lora"), [("orw_cfm", False), ("awm", False), ("diffusion_nft", True), ("ram", True)])
def test_a_run_resumes_to_the_bit(tmp_path: Path, name: str, lora: bool) -> None:
    """A black-box reward, two updates a collection, cut between two; old policies and averages come back."""
    decay = {"awm": {"ema_decay_rate": 0.1}, "diffusion_nft": {"old_decay_rate": 0.1}}.get(name, {})
    options: dict[str, Any] = dict(
        algorithm=name,
        algorithm_kwargs={"num_noise_samples": 2, **decay},
        per_device_train_batch_size=4,
        num_generations=2,
        num_iterations=2,
        max_steps=6,
        save_steps=4,
        save_total_limit=None,
    )
    peft, dataset = LoraConfig(r=2, init_lora_weights=False) if lora else None, write_dataset(tmp_path)
    whole = trainer(tmp_path, dataset, reward=quietness, peft=peft, **options)
    whole.train()
    uninterrupted = metrics(tmp_path)
    assert uninterrupted[0]["reward"] == uninterrupted[1]["reward"] != uninterrupted[2]["reward"]
    assert uninterrupted[-1]["anchor"] > 0 and {"reward_std", "frac_reward_zero_std"} < uninterrupted[0].keys()
    if name in ("diffusion_nft", "ram"):
        assert uninterrupted[0]["old_deviation"] == 0 < uninterrupted[1]["old_deviation"]

    resumed = trainer(tmp_path, dataset, reward=quietness, peft=peft, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert metrics(tmp_path) == uninterrupted
    assert same_weights(resumed.policy, whole.policy)
