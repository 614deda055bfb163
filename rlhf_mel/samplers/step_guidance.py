"""Guidance by the reward's gradient at each step of a solve, without training; equations: noise_optimisation.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.flow.noise import Generators
from rlhf_mel.flow.path import endpoint
from rlhf_mel.flow.policy import ExtendedCondition, ExtendingWrapper, Policy, collect_rollout, rollout
from rlhf_mel.flow.recompute import PureVelocity, Velocity, differentiated
from rlhf_mel.pipeline import require_gradient
from rlhf_mel.samplers.base import RewardSampler
from rlhf_mel.types import Prompts, Rollout


@dataclass(frozen=True, kw_only=True)
class StepGuidance(RewardSampler):
    """A sampler that follows the reward of the predicted endpoint in each step. Each costs a gradient more."""

    scale: float = 1.0
    """In 1 / units of the reward: the sampled density is p(x_1) exp(scale r(x_1)) as far as
    noise_optimisation.py says; 0: plain."""
    first_time: float = 0.0
    """Guidance begins at this t: what is predicted from mere noise may be no speech that a reward model can judge."""

    def __post_init__(self) -> None:
        require_gradient("step guidance", self.vocoder, self.rewards)
        if not math.isfinite(self.scale) or not 0 <= self.first_time <= 1:
            raise ValueError(
                "scale and first_time of step guidance: expected a finite number and a time from 0 to 1, got "
                f"{self.scale!r} and {self.first_time!r}"
            )

    def __call__(self, policy: Policy, prompts: Prompts, *, generator: Generators = None, **options: Any) -> Rollout:
        """One guided rollout; options: of policy.rollout."""
        return rollout(Guided(policy, self), prompts, generator=generator, grad_steps=0, **options)


class Guided(ExtendingWrapper):
    """The policy with the velocity of step guidance; a Policy itself. Its velocity has no gradient.

    What it needs besides are the prompts, for the rewards.
    """

    def __init__(self, policy: Policy, guidance: StepGuidance) -> None:
        super().__init__(policy)
        self.guidance = guidance

    @override
    def extra(self, prompts: Prompts, *, cfg_strength: float) -> Prompts:
        return prompts

    @override
    def velocity(
        self, x: Float[Tensor, "b n m"], t: Float[Tensor, " ..."], cond: ExtendedCondition
    ) -> Float[Tensor, "b n m"]:
        if float(t) == 0 or float(t) < self.guidance.first_time:
            return self.policy.velocity(x, t, cond.policy)
        unguided = super().velocity_as_now(cond)
        checkpoint = isinstance(unguided, PureVelocity) and unguided.fast
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = differentiated(unguided, checkpoint)(x, t)
            mel = self.policy.finalize(endpoint(x, v, t), cond.policy)
            (gradient,) = torch.autograd.grad(self._total(mel, cond).sum(), x)
        gradient = gradient.masked_fill(~gradient.isfinite().flatten(1).all(1)[:, None, None], 0.0)
        lever = self.guidance.scale * (1 - t) / t
        return (v + lever * gradient.where(cond.generated.unsqueeze(-1), 0.0)).detach()

    def _total(self, mel: Tensor, cond: ExtendedCondition) -> Tensor:
        """What the rewards say [b] of the generated frames of mel [b, n, m]."""
        generated = {item: mel[item, frames] for item, frames in enumerate(cond.generated)}
        return self.guidance.total(collect_rollout(generated), cond.extra)

    @override
    def velocity_as_now(self, cond: ExtendedCondition) -> Velocity:
        return partial(self.velocity, cond=cond)
