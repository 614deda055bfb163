"""rlhf-mel doctor: a healthy run passes each check; a run with one known fault fails the check of that fault."""

from __future__ import annotations

import itertools
import json
import math
import random
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from problems import reference_of, tiny_policy, tiny_prompts
from torch import Tensor, nn

from rlhf_mel import cli
from rlhf_mel.algorithms.base import algorithm_class, known_algorithms, load_algorithm
from rlhf_mel.doctor import case as doctor_case
from rlhf_mel.doctor.case import Case, Examination, Finding, Plan
from rlhf_mel.doctor.checks import CHECKS, examine, line
from rlhf_mel.doctor.cost import _judge_cost, check_cost, frames_ratio
from rlhf_mel.doctor.gradient import check_gradient, gradient_numbers
from rlhf_mel.doctor.memory import MIB, PeakMemory
from rlhf_mel.doctor.noise import check_first_ratio, check_sde_near_ode, check_zero_noise, reward_difference
from rlhf_mel.doctor.spread import check_batch_is_single, check_reward_spread
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.flow.lora import add_lora
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.training.first_batch import check_first_batch
from rlhf_mel.types import Audio, Prompts

NAN = float("nan")
SPEC = tiny_policy().mel_spec


class Voice:
    """waveform = tanh(mean of the mel channels), each frame held for one hop."""

    differentiable = True
    sample_rate_hz = SPEC.sample_rate_hz
    mel_spec = SPEC

    def __init__(self, before: Callable[[int], object] = lambda batch: None) -> None:
        self.before = before

    def __call__(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        self.before(len(mel))
        return mel.mean(-1).tanh().repeat_interleave(SPEC.hop_length, dim=1)


class DetachedVoice(Voice):
    def __call__(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        return super().__call__(mel, lengths_frames).detach()


class Near:
    """-mean (w - 0.1)^2 over an item's samples, or what `judge` makes of it and of the sound."""

    name = "near"
    domain = "waveform"
    sample_rate_hz = None
    needs: frozenset[str] = frozenset()
    range = (-math.inf, math.inf)

    def __init__(
        self, judge: Callable[[Tensor, Audio], Tensor] = lambda score, audio: score, differentiable: bool = True
    ) -> None:
        self.judge = judge
        self.differentiable = differentiable

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        rows = zip(audio.waveform, audio.lengths_samples.tolist(), strict=True)
        return self.judge(torch.stack([-(row[:length] - 0.1).square().mean() for row, length in rows]), audio)


def constant(values: list[float]) -> Near:
    """A black box: these scores for a batch of as many rows, the first ones for fewer."""
    return Near(lambda score, audio: torch.tensor(values)[: len(score)], differentiable=False)


def case(
    algorithm: str = "flow_grpo",
    policy: CFM | None = None,
    reward: Near | None = None,
    *,
    beta: float = 0.0,
    vocoder: Voice | None = None,
    rows: tuple[int, ...] = (0, 0, 1, 1),
    groups: tuple[int, ...] = (0, 0, 1, 1),
    **options: Any,
) -> Case:
    policy = policy or tiny_policy()
    reward = reward or Near(differentiable=algorithm_class(algorithm).reward_gradient)
    pipeline = Pipeline(
        policy=policy,
        vocoder=vocoder or Voice(),
        rewards=Rewards([reward]),
        reference=ReferencePolicy(policy) if beta else None,
        sampling=Sampling(steps=4, cfg_strength=0.0),
    )
    prompts = replace(tiny_prompts().select(rows), group_ids=torch.tensor(groups))
    built = load_algorithm(algorithm, options, beta=beta)
    built.check(pipeline)
    return Case(algorithm=built, pipeline=pipeline, prompts=prompts, plan=Plan(updates=3))


def drifting(drift: float, **options: Any) -> Case:
    """A run whose policy is another one after the rollout: then its velocity is higher by `drift`."""
    now = torch.zeros(())
    own = case(policy=with_velocity(lambda v, x: v + now), **options)
    collect = own.algorithm.collect

    def collect_and_drift(*args: Any) -> Any:
        now.zero_()
        collected = collect(*args)
        now.fill_(drift)
        return collected

    own.algorithm.collect = collect_and_drift  # type: ignore[method-assign]
    return own


def with_velocity(change: Callable[[Tensor, Tensor], Tensor]) -> CFM:
    """A policy whose velocity is change(velocity, x)."""
    policy = tiny_policy()
    own = policy.velocity
    policy.velocity = lambda x, t, cond: change(own(x, t, cond), x)  # type: ignore[method-assign]
    return policy


@pytest.mark.parametrize(
    ("algorithm", "beta", "skipped"),
    [
        ("flow_grpo", 0.04, set()),
        ("ddpo", 0.0, set()),
        ("draft", 1.0, {"first ratio = 1", "SDE near ODE"}),
        ("adjoint_matching", 0.5, {"first ratio = 1"}),
        ("diffusion_nft", 0.1, {"first ratio = 1", "SDE near ODE"}),
        ("awm", 0.1, {"first ratio = 1", "SDE near ODE"}),
        ("refl", 1.0, {"first ratio = 1", "SDE near ODE"}),
        ("alignprop", 1.0, {"first ratio = 1", "SDE near ODE"}),
        ("draft_lv", 1.0, {"first ratio = 1", "SDE near ODE"}),
        ("orw_cfm", 1.0, {"first ratio = 1", "SDE near ODE"}),
        ("ram", 0.01, {"first ratio = 1", "SDE near ODE"}),
    ],
)
def test_a_healthy_run_passes_and_nothing_is_changed(algorithm: str, beta: float, skipped: set[str]) -> None:
    own = case(algorithm, beta=beta)
    policy: Any = own.pipeline.policy
    policy.train()
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    findings = list(examine(own))
    assert [finding.name for finding in findings] == list(CHECKS)
    assert {finding.name for finding in findings if finding.status == "skipped"} == skipped
    wrong = [line(finding) for finding in findings if finding.status in ("warn", "fail") and finding.name != "cost"]
    assert not wrong and findings[-1].status in ("pass", "warn")  # seconds of a busy machine
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    assert policy.training and all(weight.grad is None for weight in policy.parameters())


def test_no_algorithm_is_left_out() -> None:
    (cases,) = test_a_healthy_run_passes_and_nothing_is_changed.pytestmark
    of_rollouts = [name for name in known_algorithms() if not algorithm_class(name).learns_from_pairs]
    assert sorted(algorithm for algorithm, *_ in cases.args[1]) == of_rollouts  # pairs: test_preference_runs.py


def test_half_precision_has_a_wider_tolerance_and_the_same_ratio() -> None:
    own = replace(case(), precision=lambda: torch.autocast("cpu", torch.bfloat16))
    findings = {finding.name: finding for finding in examine(own)}
    assert findings["batch = single"].numbers["tolerance"] == 0.05
    assert Examination(case()).tolerance == 0.001
    assert findings["first ratio = 1"].numbers["ratio_error"] < 1e-5
    assert not [line(finding) for finding in findings.values() if finding.status == "fail"]


def test_global_generators_stay_even_if_a_reward_draws_from_them() -> None:
    def drawing(score: Tensor, audio: Audio) -> Tensor:
        return score + 0 * (torch.rand(1) + random.random() + np.random.rand())

    own = case(reward=Near(drawing, differentiable=False))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), np.random.get_state()[2]
    list(examine(own))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all() and np.random.get_state()[2] == before[3]


def test_lora_begins_with_half_of_its_weights_at_gradient_zero() -> None:
    # B = 0, so the gradient of A is 0: as many tensors as have one
    policy = tiny_policy()
    add_lora(policy)
    finding = check_gradient(Examination(case("draft", policy)))
    assert finding.status == "pass" and finding.numbers["zero_tensors"] == 0.5


def test_a_prior_that_ignores_its_generator_is_no_zero_noise_rollout() -> None:
    # Without a velocity the mel is x_0: two independent standard normals differ by sqrt(2) of their deviation.
    policy = with_velocity(lambda v, x: torch.zeros_like(x) + 0 * v)
    prior, drawn = policy.prior, iter(range(1000))
    fresh = lambda: torch.Generator().manual_seed(next(drawn))  # noqa: E731
    policy.prior = lambda cond, generator=None: prior(cond, fresh())  # type: ignore[method-assign]
    finding = check_zero_noise(Examination(case(policy=policy)))
    assert finding.status == "fail" and "policy.prior" in finding.advice
    assert finding.numbers["deviation"] == pytest.approx(math.sqrt(2), rel=0.2)


@pytest.mark.parametrize("guard", [False, True])
def test_a_replay_by_another_policy_has_another_log_probability(guard: bool) -> None:
    # v + d moves the mean of a step from t to t' by m = d (dt + (1 - t') (1 - rho) t): dx = v dt and, of the noise
    # x - t v, the share (1 - t') (1 - rho). Then log p changes by mean(z) m / s - m^2 / (2 s^2), z = (x' - mean) / s.
    d = 0.5
    own = drifting(d, window_size=1, guard=guard)
    exam = Examination(own)
    assert check_zero_noise(exam).status == "pass"
    finding = check_first_ratio(exam)
    changes = []
    for trajectory in exam.update.collected.trajectories:
        k = trajectory.window.start
        t, end = trajectory.t[k], trajectory.t[k + 1]
        rho = (t * (1 - end) / (end * (1 - t))) ** (trajectory.sde.noise_level**2 / 2)
        m, s = d * (end - t + (1 - end) * (1 - rho) * t), (1 - end) * (1 - rho**2).sqrt()
        counted = own.pipeline.policy.encode(trajectory.prompts, cfg_strength=0.0).generated
        z = (trajectory.states[1] - trajectory.means[0]) / s
        mean_z = torch.stack([of_item[frames].mean() for of_item, frames in zip(z, counted, strict=True)])
        changes.append(mean_z * m / s - (m / s) ** 2 / 2)
    expected = torch.cat(changes).abs().max().item()
    assert finding.status == "fail" and "replayed" in finding.advice and finding.numbers["limit"] == 1e-4
    assert finding.numbers["mean_log_prob_error"] == pytest.approx(expected, rel=1e-3)


def test_a_log_probability_that_is_off_fails_where_the_ratio_is_fine() -> None:
    # GRPO-Guard's ratio is off by mean(z) m, a log-probability by about mean(z) m / s (see above), and with little
    # noise s is little. An epsilon of 1 leaves the tolerance of both at 1e-3.
    finding = check_first_ratio(Examination(drifting(0.003, guard=True, noise_level=0.02, epsilon=1.0)))
    assert finding.numbers["ratio_error"] < finding.numbers["limit"] / 10 == 1e-4
    assert finding.numbers["mean_log_prob_error"] > finding.numbers["log_prob_limit"] == 1e-3
    assert finding.status == "fail" and "replayed" in finding.advice


def test_the_loss_replays_as_the_doctor_does() -> None:
    """Where gradients are off, as in a rollout and in the first forward of a checkpointed replay, fast kernels run.

    Here they are off by 0.01 from the plain network, which a replay that is not checkpointed would take.
    """
    quick = with_velocity(lambda v, x: v if torch.is_grad_enabled() else v + 0.01)
    own = case(policy=quick, rows=(0, 0), groups=(0, 0), window_size=1)
    exam = Examination(own)
    (trajectory,) = exam.update.collected.trajectories
    assert len(trajectory.window) == 1
    assert exam.update.metrics["ratio_error"].tolist() == [0, 0]
    assert check_first_ratio(exam).numbers["ratio_error"] == 0


def test_the_ratio_error_of_the_loss_is_the_doctors() -> None:
    exam = Examination(drifting(0.5))
    found = exam.update.metrics["ratio_error"]
    # the doctor replays by the drifted policy as well, all rows of the batch
    assert found.shape == (4,) and found.min() > 0
    assert found.max().item() == pytest.approx(check_first_ratio(exam).numbers["ratio_error"], rel=1e-6)


def test_rewards_that_are_all_equal_teach_nothing() -> None:
    exam = Examination(case(reward=constant([2.0] * 4)))
    spread, gradient = check_reward_spread(exam), check_gradient(exam)
    assert spread.status == "fail" and spread.numbers["flat_groups"] == 1 and spread.numbers["spread_batch"] == 0
    assert gradient.status == "fail" and gradient.numbers["gradient_norm"] == 0
    assert gradient.advice.endswith("all rewards are equal")


def test_spread_is_that_within_groups() -> None:
    # groups [0, 0] and [1, 3]: deviations 0 and sqrt(2); all four: mean 1, squares 1 + 1 + 0 + 4 = 6, over 3
    finding = check_reward_spread(Examination(case(reward=constant([0.0, 0.0, 1.0, 3.0]))))
    assert finding.status == "warn" and "num_generations" in finding.advice
    assert finding.numbers["spread_within"] == pytest.approx(math.sqrt(2) / 2)
    assert finding.numbers["spread_batch"] == pytest.approx(math.sqrt(2))
    assert finding.numbers["flat_groups"] == 0.5 and finding.numbers["smallest_group"] == 2


def test_an_algorithm_that_compares_needs_groups() -> None:
    finding = check_reward_spread(Examination(case(groups=(0, 1, 2, 3))))
    assert finding.status == "fail" and "num_generations to at least 2" in finding.advice
    assert check_reward_spread(Examination(case("ddpo", groups=(0, 1, 2, 3)))).status == "pass"


def test_rewards_that_are_not_finite_are_named() -> None:
    exam = Examination(case(reward=constant([NAN] * 4)))
    spread, gradient = check_reward_spread(exam), check_gradient(exam)
    assert spread.status == "fail" and "no rollout got a finite reward" in spread.advice
    assert spread.numbers["not_finite"] == 4
    assert gradient.status == "fail" and gradient.numbers["dropped_rollouts"] == 4
    some = check_reward_spread(Examination(case(reward=constant([0.0, 1.0, 2.0, NAN]))))
    assert some.status == "warn" and some.numbers["not_finite"] == 1 and some.numbers["reward"] == 1


def test_a_policy_that_counts_its_batch_is_not_the_same_alone() -> None:
    # v = B everywhere: the mel is x_0 + B. Four rows together and one alone differ by 4 - 1, x_0 has deviation 1.
    policy = with_velocity(lambda v, x: torch.full_like(x, len(x)) + 0 * v)
    finding = check_batch_is_single(Examination(case(policy=policy)))
    assert finding.status == "fail" and "batch norm" in finding.advice and finding.numbers["items"] == 4
    assert finding.numbers["deviation"] == pytest.approx(3, rel=0.2) and finding.numbers["reward_change"] < 1e-5


def test_a_reward_that_counts_its_batch_is_not_the_same_alone() -> None:
    # 4 in the batch and 1 alone: a change of 3, of 4
    reward = Near(lambda score, audio: torch.full_like(score, len(score)), differentiable=False)
    finding = check_batch_is_single(Examination(case(reward=reward)))
    assert finding.status == "fail" and "lengths_samples in near" in finding.advice
    assert finding.numbers["reward_change"] == 0.75 and finding.numbers["deviation"] < 1e-5


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_reward_whose_gradient_is_cut_moves_no_weight(beta: float) -> None:
    rounded = Near(lambda score, audio: (100 * score).round())
    finding = check_gradient(Examination(case("draft", reward=rounded, beta=beta)))
    assert finding.status == "fail" and finding.numbers["gradient_norm"] == 0 and finding.numbers["zero_share"] == 1
    assert "the reward has no gradient at the mel" in finding.advice


def test_a_detached_reward_is_refused_in_its_own_words() -> None:
    detached = Near(lambda score, audio: score.detach())
    findings = {finding.name: finding for finding in examine(case("draft", reward=detached))}
    assert findings["gradient"].status == "fail"
    assert findings["gradient"].advice.startswith("raised ValueError: reward 'near' declares a gradient")
    assert findings["zero noise = ODE"].status == "pass"


def test_a_policy_that_detaches_gets_no_gradient_of_the_reward() -> None:
    finding = check_gradient(Examination(case("draft", with_velocity(lambda v, x: v.detach()))))
    assert finding.status == "fail" and "the reward's gradient reaches the mel" in finding.advice
    assert finding.numbers["unused_tensors"] == len(list(tiny_policy().parameters()))


@pytest.mark.parametrize(
    ("algorithm", "cut"),
    [
        ("draft", "rounded reward"),
        ("draft", "detached sound"),
        ("refl", "detached sound"),
        ("alignprop", "detached sound"),
        ("draft_lv", "detached sound"),
        ("adjoint_matching", "rounded reward"),  # of a detached sound it asks autograd for the gradient, which raises
    ],
)
def test_an_anchor_does_not_hide_that_the_reward_has_no_gradient(algorithm: str, cut: str) -> None:
    # LoRA with B other than 0: the policy is not its reference, and the anchor has a gradient of its own
    policy = tiny_policy()
    add_lora(policy, LoraConfig(r=2, init_lora_weights=False))
    vocoder = DetachedVoice() if cut == "detached sound" else Voice()
    reward = Near(lambda score, audio: (100 * score).round() if cut == "rounded reward" else score)
    finding = check_gradient(Examination(case(algorithm, policy, reward, beta=1.0, vocoder=vocoder)))
    assert finding.status == "fail"
    assert finding.numbers["gradient_norm"] > 0 and finding.numbers["reward_gradient_norm"] == 0
    assert "follow the anchor alone: the reward has no gradient at the mel" in finding.advice


def test_the_gradient_of_the_reward_is_that_of_draft_1() -> None:
    # without an anchor the loss of DRaFT-1 is -mean reward; with one, on another policy than the reference, it is more
    exam = Examination(case("draft"))
    numbers = check_gradient(exam).numbers
    assert numbers["reward_gradient_norm"] == pytest.approx(numbers["gradient_norm"], rel=1e-6)
    policy = tiny_policy()
    add_lora(policy, LoraConfig(r=2, init_lora_weights=False))
    anchored = check_gradient(Examination(case("draft", policy, beta=1.0)))
    alone = check_gradient(Examination(case("draft", policy)))
    assert anchored.status == alone.status == "pass"
    assert anchored.numbers["reward_gradient_norm"] == pytest.approx(alone.numbers["gradient_norm"], rel=1e-6)
    assert anchored.numbers["gradient_norm"] != pytest.approx(alone.numbers["gradient_norm"], rel=1e-2)


def test_the_gradient_of_the_reward_of_a_solver_that_cannot_be_cut_is_that_of_all_steps() -> None:
    # a velocity that is one weight everywhere, which dopri5 solves at once; without an anchor the loss is -mean reward
    policy = tiny_policy()
    own, weight = policy.velocity, next(policy.parameters())
    policy.velocity = lambda x, t, cond: 0 * own(x, t, cond) + weight.sum()  # type: ignore[method-assign]
    whole = case("draft", policy, grad_steps=None)
    sampling = replace(whole.pipeline.sampling, method="dopri5")
    finding = check_gradient(Examination(replace(whole, pipeline=replace(whole.pipeline, sampling=sampling))))
    assert finding.status != "fail" and finding.numbers["gradient_norm"] > 0
    assert finding.numbers["reward_gradient_norm"] == pytest.approx(finding.numbers["gradient_norm"], rel=1e-6)


def test_a_gradient_that_is_nan_is_found_at_the_reward() -> None:
    # sqrt has an infinite slope at 0, and 0 times infinity is NaN; such rows are dropped, all four of them
    broken = Near(lambda score, audio: score + (0 * audio.waveform.sum(1)).sqrt())
    finding = check_gradient(Examination(case("draft", reward=broken)))
    assert finding.status == "fail" and finding.numbers["dropped_rollouts"] == 4
    assert "gradient at the mel is not finite" in finding.advice


def test_gradient_numbers_by_hand() -> None:
    gradients = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]]), "c": None, "d": torch.zeros(1)}
    assert gradient_numbers(gradients) == {
        "gradient_norm": 5.0,
        "zero_share": 2 / 4,
        "zero_tensors": 1 / 3,
        "unused_tensors": 1,
    }


def test_noisy_rollouts_that_score_far_below_are_warned_of() -> None:
    target: list[Tensor] = []

    def faithful(score: Tensor, audio: Audio) -> Tensor:
        return -(audio.mel - target[0]).square().mean((1, 2)) if target and len(score) == 4 else score

    exam = Examination(case("ddpo", reward=Near(faithful, differentiable=False)))
    target.append(exam.ode.mel)
    finding = check_sde_near_ode(exam)
    assert finding.numbers["ode_reward"] == 0 and finding.numbers["spread"] == 0
    assert finding.numbers["difference"] < 0 and finding.status == "warn" and "noise_level" in finding.advice


def test_the_difference_of_rewards_by_hand() -> None:
    # pairs (1, 4), (2, 3), (6, 5): differences -3, -1, 1; mean -1, deviation 2, over sqrt(3); the fourth is left out
    numbers = reward_difference(torch.tensor([1.0, 2.0, 6.0, NAN]), torch.tensor([4.0, 3.0, 5.0, 9.0]))
    expected = {"sde_reward": 3, "ode_reward": 4, "difference": -1, "standard_error": 2 / math.sqrt(3), "spread": 1}
    assert numbers == pytest.approx(expected)


def test_a_run_is_its_updates() -> None:
    # 10 updates of 2 micro-batches, rollouts shared by 3: 20 * (6 / 3 + 4)
    assert Plan(updates=10, micro_batches=2, iterations=3).seconds(6.0, 4.0) == 120


def test_a_batch_that_costs_more_than_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]  # by the wall, a slow machine takes half a second for two rollouts

    def speak(batch: int) -> None:
        clock[0] += 0.5 if batch > 2 else 0.01

    monkeypatch.setattr(doctor_case, "_now", lambda device: clock[0])
    slow = case(vocoder=Voice(speak))
    exam = Examination(slow)
    finding = check_cost(exam)
    # 30 + 30 + 24 + 24 frames, of which the first two rollouts are 60
    assert frames_ratio(slow, exam.small_rows) == pytest.approx(108 / 60)
    numbers = finding.numbers
    assert numbers["predicted_s"] == pytest.approx(1.8 * (exam.small.collect_s + exam.small.loss_s))
    assert numbers["measured_s"] >= 0.5 and numbers["run_minutes"] == pytest.approx(3 * numbers["measured_s"] / 60)
    # AdamW keeps two numbers a weight, of 4 bytes
    weights = sum(weight.numel() for weight in tiny_policy().parameters())
    assert numbers["optimizer_mib"] == pytest.approx(8 * weights / MIB)
    assert finding.status == "warn" and "far more time than its frames" in finding.advice


def test_a_batch_that_takes_more_memory_than_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Tensor] = []
    seconds = itertools.count()
    monkeypatch.setattr(doctor_case, "_now", lambda device: float(next(seconds)))  # every part takes a second

    def hold(batch: int) -> None:
        held[:] = [torch.ones(600 * MIB // 4)] if batch > 2 else []  # 600 MiB, touched
        time.sleep(0.3)  # for the resident set to be read, on a busy machine too

    check_cost(Examination(case()))  # what the first update of a process loads is not this one's
    finding = check_cost(Examination(case(vocoder=Voice(hold))))
    numbers = finding.numbers
    # predicted: 1.8 times what two rollouts take, tens of MiB; 600 is far above 64 and half as much again. What the
    # allocator still held from before is not seen as taken: a sixth is left for that
    assert numbers["predicted_mib"] < 200 and numbers["measured_mib"] > 500
    assert finding.status == "warn" and "far more memory than its frames" in finding.advice
    assert "time" not in finding.advice, "as long for each batch"


@pytest.mark.parametrize(
    ("predicted_mib", "measured_mib", "status"), [(100, 213, "pass"), (100, 215, "warn"), (300, 100, "pass")]
)
def test_memory_may_be_half_as_much_again_and_what_an_allocator_keeps(
    predicted_mib: float, measured_mib: float, status: str
) -> None:
    # 1.5 * 100 + 64 = 214
    numbers = {"predicted_mib": predicted_mib, "measured_mib": measured_mib, "optimizer_mib": 0.0, "free_mib": 1000.0}
    assert _judge_cost(Examination(case()), {**numbers, "predicted_s": 1.0, "measured_s": 1.0})[0] == status


def test_a_batch_that_does_not_fit_is_told_which_would() -> None:
    def full(batch: int) -> None:
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    findings = {finding.name: finding for finding in examine(case(vocoder=Voice(full)))}
    assert findings["cost"].status == "fail" and "measured_s" not in findings["cost"].numbers
    assert "lower per_device_train_batch_size from 4 to at most" in findings["cost"].advice
    assert findings["gradient"].advice == "raised OutOfMemoryError: CUDA out of memory"
    assert findings["zero noise = ODE"].status == "pass"


def test_peak_memory_counts_what_is_held() -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        held = torch.ones(16 * MIB)  # 64 MiB, touched
        time.sleep(0.1)
        del held
    assert memory.peak_bytes > 60 * MIB


def test_peak_memory_is_the_most_at_once_over_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of readings as they might come; a sandbox may count freed memory for a while, so no real ones."""
    readings = iter([100, 160, 110, 190, 120])
    read = threading.Event()

    def taken(self: PeakMemory) -> int:
        value = next(readings, None)
        if value is None:
            read.set()
        return 100 if value is None else value

    monkeypatch.setattr(PeakMemory, "_taken", taken)
    with PeakMemory(torch.device("cpu")) as memory:
        assert read.wait(timeout=10)
    assert memory.peak_bytes == 90


@pytest.mark.parametrize(
    ("name", "algorithm", "metrics", "message"),
    [
        ("ratio", "ddpo", {"clip_ratio/region_mean": torch.tensor([0.0, 0.5])}, "2 fresh rollouts: expected ratio 1"),
        ("flat", "awm", {"frac_reward_zero_std": torch.tensor(1.0)}, "rewards that differ within a group"),
        ("dropped", "draft", {"dropped_rollouts": torch.tensor([True, True])}, "expected finite rewards, got none"),
        ("fine", "draft", {"frac_reward_zero_std": torch.tensor(1.0)}, None),
        # 1e-4 is the clip range of flow_grpo; below 1 and with an advantage above 0 nothing is clipped by it
        ("unclipped", "flow_grpo", {"ratio_error": torch.tensor([0.0, 2e-4])}, "expected ratio 1, got others (off by"),
        ("rounding", "flow_grpo", {"ratio_error": torch.tensor([0.0, 9e-5])}, None),
        ("NaN", "flow_grpo", {"ratio_error": torch.tensor([0.0, NAN])}, "expected ratio 1"),
        ("no groups", "ddpo", {"reward": torch.tensor([2.0, 2.0])}, "expected rewards that differ, got equal ones"),
        ("one", "ddpo", {"reward": torch.tensor([2.0])}, None),
        ("pathwise", "draft", {"reward": torch.tensor([2.0, 2.0])}, None),
        ("half flat", "awm", {"frac_reward_zero_std": torch.tensor(0.5)}, None),
    ],
)
def test_the_trainer_warns_of_a_first_batch_that_teaches_nothing(
    name: str, algorithm: str, metrics: dict[str, Tensor], message: str | None
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_first_batch(load_algorithm(algorithm), {"reward": torch.tensor([0.0, 1.0]), **metrics})
    assert [message in str(warning.message) for warning in caught] == ([True] if message else []), name
    assert all("rlhf-mel doctor" in str(warning.message) for warning in caught)


def test_the_trainer_reads_the_metrics_of_a_replay_that_differs() -> None:
    own = drifting(0.5)
    with pytest.warns(UserWarning, match="expected ratio 1"):
        check_first_batch(own.algorithm, Examination(own).update.metrics)
    healthy = case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_first_batch(healthy.algorithm, Examination(healthy).update.metrics)


def test_a_line_is_aligned_and_says_what_to_change() -> None:
    finding = Finding(name="gradient", status="fail", numbers={"loss": 0.12345}, advice="do this")
    assert line(finding) == "fail     gradient          loss 0.123  -> do this"
    assert line(replace(finding, name="zero noise = ODE", status="skipped", advice="")) == (
        "skipped  zero noise = ODE  loss 0.123"
    )


class Loud(nn.Module):
    """Mean power of the waveform: what the command is given by name."""

    name, differentiable, domain, sample_rate_hz, range = "loud", True, "waveform", None, (0.0, 1.0)
    needs: frozenset[str] = frozenset()

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        return audio.waveform.square().mean(1)


class Same(Loud):
    differentiable = False

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        return torch.ones(len(audio.waveform))


def run(folder: Path, reward: str, *options: str) -> int:
    clip = str(reference_of("joe"))
    row = {"text": "one", "reference_audio": clip, "reference_text": "Hello.", "duration_s": 0.2}
    (folder / "p.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "my.yaml").write_text(f"reward_models: ['test_doctor:{reward}']\nmax_steps: 7\nsampling_steps: 9\n")
    given = ["--config", str(folder / "my.yaml"), "--train_prompts", str(folder / "p.jsonl"), "--sampling_steps", "2"]
    given += ["--output_dir", str(folder / "run"), "--num_eval_prompts", "0", "--use_cpu", "--cpu_threads", "1"]
    given += ["--per_device_train_batch_size", "2", "--num_generations", "2", "--cfg_strength", "0"]
    return cli.main(["doctor", "--json", str(folder / "c.json"), *given, *options])


def test_the_command_reads_the_run_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "Loud", "--beta", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [text[9:25].strip() for text in lines] == list(CHECKS)
    checks = json.loads((tmp_path / "c.json").read_text())
    assert checks["failed"] == 0 and [check["name"] for check in checks["checks"]] == list(CHECKS)
    numbers = checks["checks"][-1]["numbers"]
    assert numbers["run_minutes"] == pytest.approx(7 * numbers["measured_s"] / 60)
    assert not (tmp_path / "run").exists()


def test_the_command_fails_where_a_check_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "Same", "--algorithm", "ddpo") == 1
    assert json.loads((tmp_path / "c.json").read_text())["failed"] >= 1
    assert "fail     reward spread" in capsys.readouterr().out


def test_the_command_names_what_is_wrong_with_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "Loud", "--learning_rat", "1") == 2
    assert "did you mean learning_rate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["sample", "--out", "a.wav", "--learning_rate", "1"])
