"""Guidance by the reward's gradient at each step of a solve, without training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_mel.flow.noise import Generators
from rlhf_mel.flow.path import endpoint
from rlhf_mel.flow.policy import Policy, PolicyWrapper, collect_rollout, rollout
from rlhf_mel.flow.recompute import PureVelocity, Velocity, differentiated
from rlhf_mel.pipeline import require_gradient, vocode
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.types import Prompts, Rollout
from rlhf_mel.vocoders import Vocoder


@dataclass(frozen=True, kw_only=True)
class StepGuidance:
    """A sampler that follows the reward of the predicted endpoint in each step. Each costs a gradient more."""

    vocoder: Vocoder
    rewards: Rewards
    scale: float = 1.0
    """In 1 / units of the reward: the sampled density is p(x_1) exp(scale r(x_1)) as far as the top says; 0: plain."""
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


class Prompted(NamedTuple):
    """A policy's condition, and the prompts it is of."""

    policy: Any
    prompts: Prompts
    generated: Tensor
    """Bool [B, T]."""


class Guided(PolicyWrapper):
    """The policy with the velocity of step guidance; a Policy itself. Its velocity has no gradient."""

    def __init__(self, policy: Policy, guidance: StepGuidance) -> None:
        super().__init__(policy)
        self.guidance = guidance

    def inner(self, cond: Prompted) -> Any:
        return cond.policy

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Prompted:
        cond = self.policy.encode(prompts, cfg_strength=cfg_strength)
        return Prompted(cond, prompts, cond.generated)

    def velocity(self, x: Tensor, t: Tensor, cond: Prompted) -> Tensor:
        if float(t) == 0 or float(t) < self.guidance.first_time:
            return self.policy.velocity(x, t, cond.policy)
        own = super().velocity_as_now(cond)
        checkpoint = isinstance(own, PureVelocity) and own.fast
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = differentiated(own, checkpoint)(x, t)
            mel = self.policy.finalize(endpoint(x, v, t), cond.policy)
            (gradient,) = torch.autograd.grad(self._total(mel, cond).sum(), x)
        gradient = gradient.masked_fill(~gradient.isfinite().flatten(1).all(1)[:, None, None], 0.0)
        lever = self.guidance.scale * (1 - t) / t
        return (v + lever * gradient.where(cond.generated.unsqueeze(-1), 0.0)).detach()

    def _total(self, mel: Tensor, cond: Prompted) -> Tensor:
        """What the rewards say [B] of the generated frames of mel [B, T, M]; without gradient where not finite."""
        spoken = collect_rollout({item: mel[item, own] for item, own in enumerate(cond.generated)})
        return self.guidance.rewards(vocode(self.guidance.vocoder, spoken), cond.prompts).total

    def velocity_as_now(self, cond: Prompted) -> Velocity:
        return partial(self.velocity, cond=cond)
