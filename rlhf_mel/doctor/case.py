"""A run under examination: the parts, two updates of it, and findings."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.algorithms.base import Algorithm
from rlhf_mel.algorithms.families.pairs import select_pairs
from rlhf_mel.algorithms.families.pathwise import pathwise_scores
from rlhf_mel.data.preferences.load import PairBatch
from rlhf_mel.doctor.memory import PeakMemory
from rlhf_mel.flow.noise import seeded
from rlhf_mel.flow.ode import STEPWISE_METHODS
from rlhf_mel.masked import finite_mean
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts, Rollout

Status = Literal["pass", "warn", "fail", "skipped"]


FULL_TOLERANCE = 1e-3
"""Deviation that float32 kernels of another batch size may cause, grown over the steps of a solve."""


HALF_TOLERANCE = 5e-2
"""The same in bfloat16, float16 or TF32, which a GPU's convolutions use unless told otherwise."""


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
    pairs: PairBatch | None = None
    """The micro-batch of a run on pairs of a data set; `prompts` are then what these answer."""

    def batch(self, rows: Sequence[int]) -> Prompts | PairBatch:
        """What the algorithm collects from, these rows of it."""
        return self.prompts.select(rows) if self.pairs is None else select_pairs(self.pairs, rows)


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
        """Rollouts of the micro-batch without noise in the steps."""
        with self.case.precision():
            return self.case.pipeline.sample(self.case.prompts, seeded(self.case.seed))

    @cached_property
    def ode_rewards(self) -> Float[Tensor, " b"]:
        """Total score of those."""
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
        batch = self.case.batch(self.small_rows)
        run_update(self.case, batch)
        return run_update(self.case, batch)

    @cached_property
    def _attempt(self) -> Update | Exception:
        try:
            _ = self.small
            return run_update(self.case, self.case.prompts if self.case.pairs is None else self.case.pairs)
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
            rollouts, _ = pipeline.rollout(self.case.prompts, seeded(self.case.seed), grad_steps=grad_steps)
            rewards, _ = pathwise_scores(pipeline, rollouts, self.case.prompts)
        return gradients_by(finite_mean(rewards), trainable(pipeline.policy))

    @property
    def rewards(self) -> Float[Tensor, " b"]:
        """Of the algorithm's own rollouts, as logged; of the ODE's if it logs none, or several each."""
        logged = self.update.metrics.get("reward")
        return self.ode_rewards if logged is None or len(logged) != len(self.case.prompts) else logged.detach()


def run_update(case: Case, batch: Prompts | PairBatch) -> Update:
    """Collect, loss and gradient of the trainable weights, all as in the trainer; nothing is changed by it."""
    policy = case.pipeline.policy
    algorithm = copy.deepcopy(case.algorithm, {id(policy): policy})
    weights, device = trainable(policy), case.prompts.reference_audio.device
    with PeakMemory(device) as memory:
        started = _now(device)
        with torch.no_grad(), case.precision():
            if isinstance(batch, PairBatch):
                collected = algorithm.collect_pairs(case.pipeline, batch, seeded(case.seed))
            else:
                collected = algorithm.collect(case.pipeline, batch, seeded(case.seed))
        collected_at = _now(device)
        with torch.enable_grad(), case.precision():
            loss, metrics = algorithm.loss(case.pipeline, collected, seeded(case.seed))
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
    """The weights that take a gradient, by name."""
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


def gradients_by(loss: Float[Tensor, ""], weights: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradient of `loss` with respect to each weight, None where there is no path; `.grad` stays as it is."""
    if not loss.requires_grad or not weights:
        return dict.fromkeys(weights)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))


def skipped(name: str, reason: str) -> Finding:
    """The finding of a check that has nothing to look at."""
    return Finding(name=name, status="skipped", numbers={}, advice=reason)


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def larger(most: float, values: Tensor) -> float:
    """The larger of `most` and the largest value; infinite if a value is NaN."""
    value = float(values.max())
    return math.inf if math.isnan(value) else max(most, value)


def mean_of(values: Float[Tensor, " b"]) -> float:
    """Their mean; NaN without any."""
    return float(values.mean()) if len(values) else math.nan


def std_of(values: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """Their standard deviation (n - 1); 0 of one or none."""
    return values.std() if len(values) > 1 else values.new_zeros(())
