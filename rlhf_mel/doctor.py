"""Before a run: is what the equations take for granted true of this policy, these rewards and this configuration?

    rlhf-mel doctor --config my.yaml --json checks.json          any flag of RLHFConfig goes over the file

| check             | measured                                                            | fails where                |
|-------------------|---------------------------------------------------------------------|----------------------------|
| zero noise = ODE  | SDE rollout at noise 0 against the ODE's, `deviation`               | above the tolerance        |
| first ratio = 1   | ratio and log-probability of fresh rollouts, computed again         | off by the clip range      |
| reward spread     | rewards of one batch: finite, different within their group          | nothing to compare         |
| batch = single    | mel and reward of an item in the batch against those of it alone    | above the tolerance        |
| gradient          | norm by the trainable weights: of the loss, of the reward alone     | 0, NaN or infinite         |
| SDE near ODE      | mean reward of noisy rollouts less that of ODE rollouts             | (warns if far below)       |
| cost              | seconds and memory of one update, scaled from a small one, and real | out of memory (else warns) |

`deviation` is the root mean square difference of an item's mel over the standard deviation of that mel, of the worst
item. Items of one total duration are solved together (policy.rollout), so `batch = single` gives its items one.
All checks share one real update on the run's first micro-batch: collect, loss and backward, without the optimizer.
Weights, their `.grad`, the algorithm's state and the global generators are left as they were.
"""

from __future__ import annotations

import copy
import ctypes
import json
import math
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from peft import LoraConfig
from torch import Tensor

from rlhf_mel.algorithms.base import Algorithm, Metrics, Pipeline, finite_mean, pathwise_scores
from rlhf_mel.config import RLHFConfig
from rlhf_mel.policy import item_generators, rollout
from rlhf_mel.policy_gradient import Clip, Collected, ratios
from rlhf_mel.solvers import SDE, STEPWISE_METHODS, mean_log_prob
from rlhf_mel.trainer import RATIO_TOLERANCE, RLHFTrainer, all_equal, first_ratio_limit
from rlhf_mel.trajectories import Trajectory, replay
from rlhf_mel.types import Prompts, Rollout

Status = Literal["pass", "warn", "fail", "skipped"]

FULL_TOLERANCE = 1e-3
"""Deviation that float32 kernels of another batch size may cause, grown over the steps of a solve."""
HALF_TOLERANCE = 5e-2
"""The same in bfloat16, float16 or TF32, which a GPU's convolutions use unless told otherwise."""
SLOWER = 2.0
"""How many times longer than predicted an update may take; faster is expected, since batches use a device better."""
HEAVIER = 1.5
"""How many times more memory than predicted it may take; less is expected, since weights' gradients do not grow."""
ALLOCATOR_MIB = 64.0
"""What may come on top: allocators keep freed blocks, and a CPU's resident set counts them."""
MEMORY_SHARE = 0.9
"""Of the free memory, what an update may take."""
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check says."""

    name: str
    status: Status
    numbers: Mapping[str, float]
    """What was measured; the unit is in the name."""
    advice: str = ""
    """What to change, or why it was skipped; empty where all is well."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of it the run will do."""

    updates: int
    micro_batches: int = 1
    """An update's, `gradient_accumulation_steps`."""
    iterations: int = 1
    """Updates that share rollouts."""

    def seconds(self, collect_s: float, loss_s: float) -> float:
        """Of all updates; evaluations and checkpoints come on top."""
        return self.updates * self.micro_batches * (collect_s / self.iterations + loss_s)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run that is about to begin."""

    algorithm: Algorithm
    pipeline: Pipeline
    prompts: Prompts
    """A micro-batch as the run will see it, group ids included."""
    plan: Plan
    seed: int = 0
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The autocast that rollouts and losses run in."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update without the optimizer's step: collect, loss, backward."""

    collected: Any
    loss: float
    metrics: Metrics
    gradients: Mapping[str, Tensor | None]
    """By the name of each trainable weight; None where it takes no part in the loss."""
    collect_s: float
    loss_s: float
    """Loss and backward."""
    peak_bytes: int
    """Most memory at one moment, over what was taken before: the GPU's, or on a CPU the process's resident set."""


class Examination:
    """What the checks share, each computed when first asked for."""

    def __init__(self, case: Case) -> None:
        self.case = case

    @cached_property
    def tolerance(self) -> float:
        """Of a deviation, in the precision that velocities are computed in."""
        parameters = trainable(self.case.pipeline.policy)
        device = self.case.prompts.reference_audio.device.type
        with self.case.precision():
            half = torch.is_autocast_enabled(device)
        half = half or any(parameter.element_size() < 4 for parameter in parameters.values())
        return HALF_TOLERANCE if half or device == "cuda" else FULL_TOLERANCE

    @cached_property
    def reward_tolerance(self) -> float:
        """Of a reward of one and the same mel, which is computed in float32, or on a GPU in TF32."""
        device = self.case.prompts.reference_audio.device.type
        return 10 * FULL_TOLERANCE if device == "cuda" else FULL_TOLERANCE

    @cached_property
    def ode(self) -> Rollout:
        with self.case.precision():
            return self.case.pipeline.sample(self.case.prompts, _generator(self.case.seed))

    @cached_property
    def ode_rewards(self) -> Tensor:
        with torch.no_grad():
            return self.case.pipeline.score(self.ode, self.case.prompts).total

    @cached_property
    def small_rows(self) -> list[int]:
        """The smallest batch that the algorithm can learn from: rewards without a gradient are compared."""
        compares = self.case.algorithm.needs_groups or not self.case.algorithm.reward_gradient
        return list(range(min(2 if compares else 1, len(self.case.prompts))))

    @cached_property
    def small(self) -> Update:
        """An update on `small_rows`, the second of two: the first loads and warms up."""
        prompts = self.case.prompts.select(self.small_rows)
        run_update(self.case, prompts)
        return run_update(self.case, prompts)

    @cached_property
    def _attempt(self) -> Update | Exception:
        try:
            _ = self.small
            return run_update(self.case, self.case.prompts)
        except Exception as error:  # each check that needs it says so; it is not tried again
            return error

    @property
    def update(self) -> Update:
        """An update on the whole micro-batch."""
        if isinstance(self._attempt, Exception):
            raise self._attempt
        return self._attempt

    @cached_property
    def reward_gradients(self) -> Mapping[str, Tensor | None]:
        """Of the mean reward by each trainable weight, without an anchor, through the last step of rollouts.

        Through all of them where the solver is one that cannot be cut.
        """
        pipeline = replace(self.case.pipeline, reference=None)
        grad_steps = 1 if pipeline.sampling.method in STEPWISE_METHODS else pipeline.sampling.steps
        with torch.enable_grad(), self.case.precision():
            spoken, _ = pipeline.rollout(self.case.prompts, _generator(self.case.seed), grad_steps=grad_steps)
            rewards, _ = pathwise_scores(pipeline, spoken, self.case.prompts)
        return gradients_by(finite_mean(rewards), trainable(pipeline.policy))

    @property
    def rewards(self) -> Tensor:
        """Float [B]: of the algorithm's own rollouts, as logged; of the ODE's if it logs none, or several each."""
        logged = self.update.metrics.get("reward")
        return self.ode_rewards if logged is None or len(logged) != len(self.case.prompts) else logged.detach()


def run_update(case: Case, prompts: Prompts) -> Update:
    """Collect, loss and gradient by the trainable weights, all as in the trainer; nothing is changed by it."""
    policy = case.pipeline.policy
    algorithm = copy.deepcopy(case.algorithm, {id(policy): policy})
    weights, device = trainable(policy), prompts.reference_audio.device
    with PeakMemory(device) as memory:
        started = _now(device)
        with torch.no_grad(), case.precision():
            collected = algorithm.collect(case.pipeline, prompts, _generator(case.seed))
        collected_at = _now(device)
        with torch.enable_grad(), case.precision():
            loss, metrics = algorithm.loss(case.pipeline, collected, _generator(case.seed))
        gradients = gradients_by(loss, weights)
        ended = _now(device)
    return Update(
        collected=collected,
        loss=float(loss.detach()),
        metrics=metrics,
        gradients=gradients,
        collect_s=collected_at - started,
        loss_s=ended - collected_at,
        peak_bytes=memory.peak_bytes,
    )


def trainable(policy: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


def gradients_by(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradient of `loss` by each weight, None where there is no path; `.grad` stays as it is."""
    if not loss.requires_grad or not weights:
        return dict.fromkeys(weights)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))


def check_zero_noise(exam: Examination) -> Finding:
    """SDE steps with noise 0 are Euler's, so both rollouts are one, from the same x_0."""
    case = exam.case
    sampling = replace(case.pipeline.sampling, method="euler")
    pipeline, steps = replace(case.pipeline, sampling=sampling), sampling.steps
    sde = SDE(kind=(noise_of(case.algorithm) or SDE()).kind, noise_level=0.0)
    with case.precision():
        same = sampling == case.pipeline.sampling
        ode = exam.ode if same else pipeline.sample(case.prompts, _generator(case.seed))
        quiet, _ = pipeline.sde_rollout(case.prompts, _generator(case.seed), sde=sde, window=range(steps))
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
    name, collected = "first ratio = 1", exam.update.collected
    if not isinstance(collected, Collected):
        return _skipped(name, f"{exam.case.algorithm.name} uses no probabilities of steps")
    clip = getattr(getattr(exam.case.algorithm, "config", None), "clip", Clip(low=math.inf, high=math.inf))
    limit = first_ratio_limit(exam.case.algorithm)
    # The ratio is exp of the difference of log p, and as far off; GRPO-Guard's is another, and so is its clip range.
    log_prob_limit = RATIO_TOLERANCE if clip.guard else limit
    ratio_error, log_prob_error = first_ratio_errors(exam.case, collected.trajectories, clip)
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
        ratio_error = _larger(ratio_error, (ratio - 1).abs())
        log_prob_error = _larger(log_prob_error, (log_probs - trajectory.mean_log_probs).abs())
    return ratio_error, log_prob_error


def check_reward_spread(exam: Examination) -> Finding:
    """Rollouts that are compared need rewards that differ, within their group or, alone in it, in the batch."""
    algorithm, rewards = exam.case.algorithm, exam.rewards.float().cpu()
    ids = torch.arange(len(rewards)) if exam.case.prompts.group_ids is None else exam.case.prompts.group_ids.cpu()
    groups = [rewards[(ids == group) & rewards.isfinite()] for group in ids.unique()]
    smallest = min(int((ids == group).sum()) for group in ids.unique())
    finite = rewards[rewards.isfinite()]
    compared = groups if smallest > 1 else [finite]
    flat = sum(all_equal(group) for group in compared)
    numbers = {
        "smallest_group": smallest,
        "reward": _mean(finite),
        "spread_within": _mean(torch.stack([_std(group) for group in compared])),
        "spread_batch": float(_std(finite)),
        "flat_groups": flat / len(compared),
        "not_finite": len(rewards) - len(finite),
    }
    status, advice = _judge_spread(algorithm, numbers)
    return Finding(name="reward spread", status=status, numbers=numbers, advice=advice)


def _judge_spread(algorithm: Algorithm, numbers: Mapping[str, float]) -> tuple[Status, str]:
    compares = not algorithm.reward_gradient
    if math.isnan(numbers["reward"]):
        return "fail", "no rollout got a finite reward: listen to what the policy says, then score it by hand"
    if algorithm.needs_groups and numbers["smallest_group"] < 2:
        return "fail", f"{algorithm.name} compares rollouts of one prompt: set num_generations to at least 2"
    if compares and numbers["flat_groups"] == 1:
        return "fail", "all rewards that are compared are equal: choose a finer reward, or more noise_level"
    if numbers["not_finite"]:
        return "warn", "rollouts without a finite reward are dropped: see which rows the reward cannot score, and why"
    if compares and numbers["flat_groups"] > 0:
        return "warn", "groups of equal rewards teach nothing: raise num_generations, or choose a finer reward"
    return "pass", ""


def check_batch_is_single(exam: Examination) -> Finding:
    """The mel of an item, and the reward of one mel, are the same in the batch and alone."""
    case = exam.case
    rows = rows_to_try(exam.ode.lengths_frames.tolist())
    mel_deviation = _alone_deviation(exam, rows)
    reward_change = max(_alone_reward_change(exam, row) for row in rows)
    mel_off, reward_off = not mel_deviation <= exam.tolerance, not reward_change <= exam.reward_tolerance
    advice = ""
    if mel_off:
        advice = (
            "an item's mel depends on what it is batched with: look for means over the batch, batch norm, or unmasked "
            "padding in encode and velocity"
        )
    elif reward_off:
        names = " or ".join(case.pipeline.rewards.names)
        advice = f"a reward depends on what it is batched with: mask the padding by lengths_samples in {names}"
    return Finding(
        name="batch = single",
        status="fail" if mel_off or reward_off else "pass",
        numbers={
            "deviation": mel_deviation,
            "tolerance": exam.tolerance,
            "reward_change": reward_change,
            "items": len(rows),
        },
        advice=advice,
    )


def rows_to_try(lengths_frames: Sequence[int]) -> list[int]:
    """First and last item, the shortest and the longest: padded and not, at either end of the batch."""
    order = sorted(range(len(lengths_frames)), key=lambda row: lengths_frames[row])
    return sorted({0, len(order) - 1, order[0], order[-1]})


def _alone_deviation(exam: Examination, rows: Sequence[int]) -> float:
    """Worst deviation of `rows` solved one by one from `rows` solved at once, for which they get one duration."""
    case = exam.case
    prompts = case.prompts.select(rows)
    durations_frames = case.pipeline.policy.durations(prompts)
    prompts = replace(prompts, durations_frames=torch.full_like(durations_frames, int(durations_frames.max())))

    def spoken(items: Sequence[int]) -> Rollout:
        noise = item_generators(_generator(case.seed), len(rows))
        assert noise is not None
        generators = [noise[item] for item in items]
        options = asdict(case.pipeline.sampling)
        return rollout(case.pipeline.policy, prompts.select(items), generator=generators, grad_steps=0, **options)

    with case.precision():
        together = spoken(range(len(rows)))
        return max(deviations(spoken([item]), _item(together, item))[0] for item in range(len(rows)))


def _alone_reward_change(exam: Examination, row: int) -> float:
    """|reward alone - reward in the batch|, over the reward's size or 1; 0 if neither is finite."""
    with torch.no_grad():
        alone = float(exam.case.pipeline.score(_item(exam.ode, row), exam.case.prompts.select([row])).total)
    together = float(exam.ode_rewards[row])
    if not math.isfinite(alone) and not math.isfinite(together):
        return 0.0
    change = abs(alone - together) / max(abs(together), 1.0)
    return math.inf if math.isnan(change) else change


def check_gradient(exam: Examination) -> Finding:
    """What the first update would do to the weights. LoRA starts with half of its weights at gradient zero.

    Where the loss follows the reward's own gradient, that is measured alone too: an anchor has one without any reward.
    """
    update = exam.update
    numbers = {"loss": update.loss, **gradient_numbers(update.gradients)}
    if exam.case.algorithm.reward_gradient:
        numbers["reward_gradient_norm"] = gradient_numbers(exam.reward_gradients)["gradient_norm"]
    numbers["dropped_rollouts"] = float(update.metrics.get("dropped_rollouts", torch.zeros(1)).sum())
    status, advice = _judge_gradient(exam, numbers)
    return Finding(name="gradient", status=status, numbers=numbers, advice=advice)


def gradient_numbers(gradients: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Norm over all weights; shares of zeros, of the numbers and of whole tensors; tensors outside of the loss."""
    present = [gradient.detach().float() for gradient in gradients.values() if gradient is not None]
    zeros = sum(int((gradient == 0).sum()) for gradient in present)
    elements = sum(gradient.numel() for gradient in present)
    empty = sum(not bool(gradient.any()) for gradient in present)
    return {
        "gradient_norm": math.sqrt(sum(float(gradient.double().square().sum()) for gradient in present)),
        "zero_share": zeros / elements if elements else 1.0,
        "zero_tensors": empty / len(present) if present else 1.0,
        "unused_tensors": len(gradients) - len(present),
    }


def _judge_gradient(exam: Examination, numbers: Mapping[str, float]) -> tuple[Status, str]:
    norm = numbers["gradient_norm"]
    reward_norm = numbers.get("reward_gradient_norm", norm)
    if not exam.update.gradients:
        return "fail", "the policy has no trainable weight: set requires_grad, or --use_peft"
    if not all(map(math.isfinite, (norm, reward_norm, numbers["loss"]))):
        return "fail", "loss or gradient is NaN or infinite: " + _where_it_breaks(exam)
    if norm == 0:
        return "fail", "no weight would move: " + _where_it_breaks(exam)
    if reward_norm == 0:
        return "fail", "the weights would follow the anchor alone: " + _where_it_breaks(exam)
    if numbers["dropped_rollouts"]:
        return "warn", "rollouts without a finite reward or gradient are left out: see which, and why"
    if numbers["unused_tensors"]:
        return "warn", "trainable weights take no part in the loss: freeze them (or --ddp_find_unused_parameters true)"
    if numbers["zero_tensors"] > 0.5:
        return "warn", "most weight tensors get no gradient: look for zero initialisation and detach in the policy"
    return "pass", ""


def _where_it_breaks(exam: Examination) -> str:
    """Which part of policy -> mel -> sound -> reward the fault lies in."""
    if not exam.case.algorithm.reward_gradient:
        flat = all_equal(exam.rewards[exam.rewards.isfinite()])
        return "all rewards are equal" if flat else "look for detach or no_grad in encode and velocity"
    with torch.enable_grad():
        mel = exam.ode.mel.detach().clone().requires_grad_()
        total = exam.case.pipeline.score(replace(exam.ode, mel=mel), exam.case.prompts).total.sum()
        (gradient,) = torch.autograd.grad(total, mel, allow_unused=True) if total.requires_grad else (None,)
    if gradient is None or not bool(gradient.any()):
        return "the reward has no gradient by the mel; look for detach, numpy, rounding or clamps in vocoder and reward"
    if not bool(gradient.isfinite().all()):
        return "the reward's gradient by the mel is not finite; look for sqrt, log or division at 0, e.g. in padding"
    return "the reward's gradient reaches the mel; look for detach or no_grad in encode, velocity and finalize"


def check_sde_near_ode(exam: Examination) -> Finding:
    """What is learnt on noisy rollouts is heard without noise: they should be worth about the same."""
    name = "SDE near ODE"
    noise_level = max((t.sde.noise_level for t in trajectories_of(exam.update.collected)), default=0.0)
    if noise_level == 0:
        return _skipped(name, f"{exam.case.algorithm.name} rolls out without noise")
    numbers = reward_difference(exam.rewards, exam.ode_rewards) | {"noise_level": noise_level}
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


def reward_difference(noisy: Tensor, ode: Tensor) -> dict[str, float]:
    """Means over the rollouts that both scored, their paired difference, its standard error; spread of the ODE's."""
    noisy, ode = noisy.float().cpu(), ode.float().cpu()
    both = noisy.isfinite() & ode.isfinite()
    noisy, ode = noisy[both], ode[both]
    return {
        "sde_reward": _mean(noisy),
        "ode_reward": _mean(ode),
        "difference": _mean(noisy - ode),
        "standard_error": float(_std(noisy - ode)) / math.sqrt(max(len(ode), 1)),
        "spread": float(_std(ode)),
    }


def check_cost(exam: Examination) -> Finding:
    """Seconds and memory of an update: those of the smallest batch times frames over its frames, and measured."""
    case = exam.case
    small, scale = exam.small, frames_ratio(case, exam.small_rows)
    device = case.prompts.reference_audio.device
    weights = trainable(case.pipeline.policy).values()
    optimizer_bytes = 2 * sum(weight.numel() * weight.element_size() for weight in weights)
    numbers = {
        "predicted_s": scale * (small.collect_s + small.loss_s),
        "predicted_mib": scale * small.peak_bytes / MIB,
        "optimizer_mib": optimizer_bytes / MIB,
        "free_mib": free_bytes(device) / MIB,
    }
    if isinstance(exam._attempt, torch.OutOfMemoryError):
        return Finding(name="cost", status="fail", numbers=numbers, advice=_fitting_batch(exam, numbers))
    update = exam.update
    numbers |= {
        "measured_s": update.collect_s + update.loss_s,
        "measured_mib": update.peak_bytes / MIB,
        "run_minutes": case.plan.seconds(update.collect_s, update.loss_s) / 60,
    }
    status, advice = _judge_cost(exam, numbers)
    return Finding(name="cost", status=status, numbers=numbers, advice=advice)


def _judge_cost(exam: Examination, numbers: Mapping[str, float]) -> tuple[Status, str]:
    if numbers["measured_mib"] + numbers["optimizer_mib"] > MEMORY_SHARE * numbers["free_mib"]:
        return "warn", "with the optimizer's state memory is nearly full; " + _fitting_batch(exam, numbers)
    advice = []
    if numbers["measured_mib"] > HEAVIER * numbers["predicted_mib"] + ALLOCATOR_MIB:
        advice.append(
            "the batch takes far more memory than its frames: set reward_batch_size (vocoder and rewards hear a batch "
            "padded to its longest), or look for what grows faster than frames, as attention maps do"
        )
    if numbers["measured_s"] > SLOWER * numbers["predicted_s"]:
        advice.append(
            "the batch takes far more time than its frames: look for swapping, for cpu_threads and other jobs, or "
            "lower per_device_train_batch_size and raise gradient_accumulation_steps"
        )
    return ("warn" if advice else "pass"), "; ".join(advice)


def _fitting_batch(exam: Examination, numbers: Mapping[str, float]) -> str:
    """Advice on the batch size, by the larger of the two memory figures."""
    batch = len(exam.case.prompts)
    per_rollout = max(numbers["predicted_mib"], numbers.get("measured_mib", 0.0)) / batch
    room = MEMORY_SHARE * numbers["free_mib"] - numbers["optimizer_mib"]
    fits = min(max(int(room / per_rollout), 1), max(batch - 1, 1)) if per_rollout > 0 else max(batch // 2, 1)
    return (
        f"lower per_device_train_batch_size from {batch} to at most {fits} and raise gradient_accumulation_steps, or "
        "train with --use_peft or --bf16"
    )


def frames_ratio(case: Case, rows: Sequence[int]) -> float:
    """Total mel frames of the batch over those of `rows`."""
    frames = case.pipeline.policy.durations(case.prompts)
    return float(frames.sum() / frames[list(rows)].sum())


CHECKS: Mapping[str, Callable[[Examination], Finding]] = {
    "zero noise = ODE": check_zero_noise,
    "first ratio = 1": check_first_ratio,
    "reward spread": check_reward_spread,
    "batch = single": check_batch_is_single,
    "gradient": check_gradient,
    "SDE near ODE": check_sde_near_ode,
    "cost": check_cost,
}


def examine(case: Case) -> Iterator[Finding]:
    """All checks, one after the other; one that raises has failed, and says with what."""
    exam = Examination(case)
    for name, check in CHECKS.items():
        with global_generators_kept():
            finding = _guarded(name, check, exam)
        yield finding


def _guarded(name: str, check: Callable[[Examination], Finding], exam: Examination) -> Finding:
    try:
        return check(exam)
    except Exception as error:  # whatever a policy or reward of one's own may raise is a finding
        said = " ".join(str(error).split())
        return Finding(name=name, status="fail", numbers={}, advice=f"raised {type(error).__name__}: {said}")


def doctor(args: RLHFConfig, peft_config: LoraConfig | None = None, json_file: Path | None = None) -> int:
    """Examine the run that `args` describe, a line a check; 1 if a check failed, else 0.

    Raises:
        ValueError: what the trainer raises for a run that cannot begin.
    """
    if args.world_size > 1:
        raise ValueError(f"doctor: expected one process, got {args.world_size}; start it without accelerate launch")
    with global_generators_kept(), tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder  # of this object alone: the run's own folder is not begun
        case = case_of(RLHFTrainer(args=args, peft_config=peft_config))
        findings = []
        for finding in examine(case):
            findings.append(finding)
            print(line(finding), flush=True)
    if json_file is not None:
        write_json(json_file, findings)
    return int(any(finding.status == "fail" for finding in findings))


def case_of(trainer: RLHFTrainer) -> Case:
    """The trainer's first micro-batch and its plan."""
    args = trainer.args
    loader = trainer.get_train_dataloader()
    prompts = next(iter(loader))["prompts"].to(args.device)
    a_epoch = max(len(loader) // args.gradient_accumulation_steps, 1)
    updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * a_epoch)
    update_loss: Any = trainer.model
    return Case(
        algorithm=update_loss.algorithm,
        pipeline=trainer.pipeline,
        prompts=prompts,
        plan=Plan(updates=updates, micro_batches=args.gradient_accumulation_steps, iterations=args.num_iterations),
        seed=args.seed,
        precision=trainer.accelerator.autocast,
    )


def line(finding: Finding) -> str:
    """`status  name  numbers  -> what to change`, aligned."""
    numbers = "  ".join(f"{name} {value:.3g}" for name, value in finding.numbers.items())
    advice = f"-> {finding.advice}" if finding.advice else ""
    return f"{finding.status:<7}  {finding.name:<16}  {'  '.join(part for part in (numbers, advice) if part)}".rstrip()


def write_json(path: Path, findings: Sequence[Finding]) -> None:
    """{"failed": count, "checks": [...]}; NaN and infinity, which JSON lacks, as null."""
    checks = [
        {**asdict(f), "numbers": {name: value if math.isfinite(value) else None for name, value in f.numbers.items()}}
        for f in findings
    ]
    failed = sum(finding.status == "fail" for finding in findings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"failed": failed, "checks": checks}, indent=2) + "\n", encoding="utf-8")


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """The global generators of torch, numpy and Python leave as they came, whatever a model draws from them."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


class PeakMemory:
    """`peak_bytes` taken inside over what was taken before: CUDA's own count, else the resident set every 5 ms."""

    INTERVAL_S = 0.005

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._sample, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type != "cuda":
            _return_freed_memory()
        self._before = self._taken()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._ended.set()
            self._watch.join()

    def _sample(self) -> None:
        while not self._ended.wait(self.INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, self._taken() - self._before)

    def _taken(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return psutil.Process().memory_info().rss


def _return_freed_memory() -> None:
    """Let glibc give freed memory back, or the second of two equal runs seems to need none; elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def free_bytes(device: torch.device) -> int:
    """What this process could still take: of the GPU, its own cache included, or of the machine's memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def deviations(found: Rollout, expected: Rollout) -> list[float]:
    """Of each item, the root mean square difference over the deviation of the expected mel; other frames: infinite."""
    if found.lengths_frames.tolist() != expected.lengths_frames.tolist():
        return [math.inf]
    rows = zip(found.mel, expected.mel, expected.lengths_frames.tolist(), strict=True)
    return [_deviation(one[:length].double(), other[:length].double()) for one, other, length in rows]


def _deviation(found: Tensor, expected: Tensor) -> float:
    difference = float((found - expected).square().mean().sqrt())
    return difference / max(float(expected.std()), 1e-12) if math.isfinite(difference) else math.inf


def noise_of(algorithm: Algorithm) -> SDE | None:
    """The noise of an algorithm's rollouts, where its Config has any."""
    return getattr(getattr(algorithm, "config", None), "step_noise", None)


def trajectories_of(collected: Any) -> list[Trajectory]:
    """What an algorithm kept of SDE rollouts: itself, or with its targets."""
    kept = list(getattr(collected, "trajectories", ()))
    return kept + [targets.trajectory for targets in getattr(collected, "targets", ())]


def _skipped(name: str, reason: str) -> Finding:
    return Finding(name=name, status="skipped", numbers={}, advice=reason)


def _item(spoken: Rollout, row: int) -> Rollout:
    length = int(spoken.lengths_frames[row])
    return Rollout(spoken.mel[row : row + 1, :length], spoken.lengths_frames[row : row + 1])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _larger(most: float, values: Tensor) -> float:
    """The larger of the two; infinite if a value is NaN."""
    value = float(values.max())
    return math.inf if math.isnan(value) else max(most, value)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _std(values: Tensor) -> Tensor:
    return values.std() if len(values) > 1 else values.new_zeros(())
