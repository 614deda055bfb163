"""Checks of noise: a noiseless SDE is the ODE, the first ratio is 1, SDE rollouts are worth the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.algorithms.base import Clip
from rlhf_mel.algorithms.families.policy_gradient import ratios
from rlhf_mel.doctor.case import Case, Examination, Finding, Status, larger, mean_of, skipped, std_of
from rlhf_mel.flow.noise import seeded
from rlhf_mel.flow.sde import SDE, mean_log_prob
from rlhf_mel.flow.sde_rollout import Trajectory, replay
from rlhf_mel.training.first_batch import RATIO_TOLERANCE, first_ratio_limit
from rlhf_mel.types import Rollout


def check_zero_noise(exam: Examination) -> Finding:
    """SDE steps with noise 0 are Euler's, so both rollouts are one, from the same x_0."""
    case = exam.case
    sampling = replace(case.pipeline.sampling, method="euler")
    pipeline, steps = replace(case.pipeline, sampling=sampling), sampling.steps
    sde = SDE(kind=(case.algorithm.step_noise or SDE()).kind, noise_level=0.0)
    with case.precision():
        same = sampling == case.pipeline.sampling
        ode = exam.ode if same else pipeline.sample(case.prompts, seeded(case.seed))
        quiet, _ = pipeline.sde_rollout(case.prompts, seeded(case.seed), sde=sde, window=range(steps))
    worst = max(deviations(quiet, ode))
    fine = worst <= exam.tolerance
    advice = (
        "two rollouts from one generator differ: make policy.prior draw from the generator it is given, and "
        "policy.velocity a function of (x, t, cond) alone (no dropout, no counter, no global random numbers)"
    )
    return Finding(
        name="zero noise = ODE",
        status="pass" if fine else "fail",
        numbers={"deviation": worst, "tolerance": exam.tolerance},
        advice="" if fine else advice,
    )


def check_first_ratio(exam: Examination) -> Finding:
    """exp(log p_theta - log p_old) of the steps just taken, by the weights that took them: 1, as log p is the same."""
    name, algorithm = "first ratio = 1", exam.case.algorithm
    clip, trajectories = algorithm.clip, algorithm.trajectories(exam.update.collected)
    if clip is None or not trajectories:
        return skipped(name, f"{algorithm.name} uses no probabilities of steps")
    limit = first_ratio_limit(algorithm)
    # The ratio is exp of the difference of log p, and as far off; GRPO-Guard's is another, and so is its clip range.
    log_prob_limit = RATIO_TOLERANCE if clip.guard else limit
    ratio_error, log_prob_error = first_ratio_errors(exam.case, trajectories, clip)
    worst = max(ratio_error / limit, log_prob_error / log_prob_limit)
    status: Status = "fail" if worst > 1 else "warn" if worst > 0.1 else "pass"
    advice = (
        "the policy that is replayed is not the one that rolled out: look for dropout or branches on self.training "
        "in encode and velocity, and for weights exchanged in between; else train without --bf16, or raise epsilon"
    )
    numbers = {
        "ratio_error": ratio_error,
        "limit": limit,
        "mean_log_prob_error": log_prob_error,
        "log_prob_limit": log_prob_limit,
    }
    return Finding(name=name, status=status, numbers=numbers, advice="" if status == "pass" else advice)


def first_ratio_errors(case: Case, trajectories: Sequence[Trajectory], clip: Clip) -> tuple[float, float]:
    """Largest |ratio - 1| and |difference of mean log-probabilities|, replayed as the loss does it."""
    ratio_error = log_prob_error = 0.0
    for trajectory in trajectories:
        with torch.enable_grad(), case.precision():
            transitions, counted = replay(case.pipeline.policy, trajectory)
            ratio = ratios(trajectory, transitions, counted, clip).detach()
        visited = zip(trajectory.states[1:], transitions, strict=True)
        log_probs = torch.stack([mean_log_prob(x, step, counted).detach() for x, step in visited])
        ratio_error = larger(ratio_error, (ratio - 1).abs())
        log_prob_error = larger(log_prob_error, (log_probs - trajectory.mean_log_probs).abs())
    return ratio_error, log_prob_error


def check_sde_near_ode(exam: Examination) -> Finding:
    """Training uses SDE noise, evaluation does not: both should be worth about the same."""
    name = "SDE near ODE"
    noise = exam.case.algorithm.step_noise
    if noise is None or noise.noise_level == 0:
        return skipped(name, f"{exam.case.algorithm.name} rolls out without noise")
    numbers = reward_difference(exam.rewards, exam.ode_rewards) | {"noise_level": noise.noise_level}
    status, advice = _judge_difference(numbers)
    return Finding(name=name, status=status, numbers=numbers, advice=advice)


def _judge_difference(numbers: Mapping[str, float]) -> tuple[Status, str]:
    if not math.isfinite(numbers["difference"]):
        return "warn", "no finite rewards to compare: see why rewards are not finite"
    if numbers["difference"] < -max(2 * numbers["standard_error"], numbers["spread"]):
        return "warn", (
            "noisy rollouts score far below those of the ODE: lower noise_level, use sde exponential, a smaller "
            "window or more sampling_steps"
        )
    return "pass", ""


def reward_difference(noisy: Float[Tensor, " b"], ode: Float[Tensor, " b"]) -> dict[str, float]:
    """Means over the rollouts that both scored, their paired difference, its standard error; spread of the ODE's."""
    noisy, ode = noisy.float().cpu(), ode.float().cpu()
    both = noisy.isfinite() & ode.isfinite()
    noisy, ode = noisy[both], ode[both]
    return {
        "sde_reward": mean_of(noisy),
        "ode_reward": mean_of(ode),
        "difference": mean_of(noisy - ode),
        "standard_error": float(std_of(noisy - ode)) / math.sqrt(max(len(ode), 1)),
        "spread": float(std_of(ode)),
    }


def deviations(found: Rollout, expected: Rollout) -> list[float]:
    """Of each item, the root mean square difference over the deviation of the expected mel; other frames: infinite."""
    if found.lengths_frames.tolist() != expected.lengths_frames.tolist():
        return [math.inf]
    rows = zip(found.mel, expected.mel, expected.lengths_frames.tolist(), strict=True)
    return [_deviation(one[:length].double(), other[:length].double()) for one, other, length in rows]


def _deviation(found: Tensor, expected: Tensor) -> float:
    difference = float((found - expected).square().mean().sqrt())
    return difference / max(float(expected.std()), 1e-12) if math.isfinite(difference) else math.inf
