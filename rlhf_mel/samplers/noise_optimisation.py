"""Reward-gradient guidance: better speech at inference, from the policy as it is.

Noise optimisation ascends the reward in the noise of each item, with the exact gradient through the whole solve:

    x_0 <- x_0 + eta_j sqrt(D) h / |h|,    h = d r / d x_0 (x_1(x_0))              D elements, eta_j falls from eta to 0
    prior = "sphere":    h without its part along x_0, and then back to the |x_0| that was drawn: eta_j is an angle
    prior = "gaussian":  h = d r / d x_0 - w x_0, the gradient of r + w log N(x_0; 0, I)

On the sphere noise stays as typical as it was: |x_0| of D numbers is sqrt(D) +- 0.7. Of all the noises on the way the
best is kept, the first of them being that of plain sampling, so no score falls. (Tang et al. 2024, DNO, arXiv
2405.18881, find the ways off the typical set; Eyring et al. 2024, ReNO, arXiv 2406.04312.)

Step guidance bends the flow itself. The flow to p*(x_1) ~ p(x_1) exp(scale r(x_1)) has the velocity

    v*(x, t) = v(x, t) + (1 - t) / t grad log E[exp(scale r(x_1)) | x_t = x]

(its score is the flow's plus that gradient; see path.py). With the endpoint that v predicts in place of x_1,

    v*(x, t) ~ v(x, t) + (1 - t) / t scale d/dx r(x + (1 - t) v(x, t))

which is exact for a Gaussian flow and a linear r, and of first order in the spread of x_1 given x_t otherwise (Chung et
al. 2023, DPS, arXiv 2209.14687). At t = 0 the endpoint of an exact flow does not depend on x and nothing is added.

Only generated frames are optimised and guided. Both need a reward and a vocoder with gradients; both are samplers, for
`evaluate(..., sampler=NoiseOptimisation(...))`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_mel.flow.noise import Generators, item_generators, of_rows
from rlhf_mel.flow.policy import Policy, evaluating, rollout, rows_by_duration, with_durations
from rlhf_mel.flow.start_states import Restarted, begin_at
from rlhf_mel.pipeline import require_gradient
from rlhf_mel.samplers.base import RewardSampler
from rlhf_mel.samplers.best_of_n import better
from rlhf_mel.types import Prompts, Rollout

PRIORS = ("sphere", "gaussian")


@dataclass(frozen=True, kw_only=True)
class NoiseOptimisation(RewardSampler):
    """A sampler that ascends the reward in the noise. Costs updates + 1 solves, each with its gradient."""

    updates: int = 20
    step_size: float = 0.1
    """eta, the first step as a share of the norm of noise; on the sphere: in radians. Later ones fall linearly to 0."""
    prior: str = "sphere"
    prior_weight: float = 0.0
    """w of the "gaussian" prior, in units of the reward: 1 nat less likely noise costs w."""

    def __post_init__(self) -> None:
        require_gradient("noise optimisation", self.vocoder, self.rewards)
        if not isinstance(self.updates, int) or self.updates < 0:
            raise ValueError(f"updates of noise optimisation: expected a whole number from 0, got {self.updates!r}")
        if not self.step_size > 0 or not self.prior_weight >= 0:
            raise ValueError(
                "step_size and prior_weight of noise optimisation: expected above 0 and at least 0, got "
                f"{self.step_size!r} and {self.prior_weight!r}"
            )
        if self.prior not in PRIORS or (self.prior == "sphere" and self.prior_weight):
            raise ValueError(
                f"prior of noise optimisation: expected one of {list(PRIORS)}, prior_weight with 'gaussian' "
                f"only, got {self.prior!r} and {self.prior_weight!r}"
            )

    @torch.enable_grad()
    def __call__(self, policy: Policy, prompts: Prompts, *, generator: Generators = None, **options: Any) -> Rollout:
        """The best rollout on the way; options: of policy.rollout."""
        generators = item_generators(generator, len(prompts))
        prompts = with_durations(policy, prompts, generators)
        noise, free = drawn_noise(policy, prompts, generators, cfg_strength=options.get("cfg_strength", 2.0))
        best, best_value = None, torch.tensor(-torch.inf)
        for update in range(self.updates + 1):
            noise = [x0.detach().requires_grad_() for x0 in noise]
            candidate, value, gradients = self._climb(policy, prompts, noise, free, options)
            best = candidate if best is None else better(best, candidate, value > best_value)
            best_value = torch.maximum(value, best_value.to(value))
            size = self.step_size * (1 - update / max(self.updates, 1))
            rows = zip(noise, gradients, free, strict=True)
            noise = [moved(x0, gradient, frames, size, self.prior) for x0, gradient, frames in rows]
        assert best is not None
        return best

    def _climb(
        self, policy: Policy, prompts: Prompts, noise: list[Tensor], free: list[Tensor], options: dict[str, Any]
    ) -> tuple[Rollout, Tensor, Sequence[Tensor]]:
        """Rollout from `noise`, its objective [B] (-inf where there is none), and its gradient at each noise [T, M]."""
        candidate = rollout(Restarted(policy), begin_at(prompts, noise), **options)
        total = self.total(candidate, prompts)
        energy = torch.stack([x0[frames].square().sum() / 2 for x0, frames in zip(noise, free, strict=True)])
        value = total - self.prior_weight * energy
        gradients = torch.autograd.grad(value.sum(), noise)
        value = value.detach().where(value.isfinite(), -torch.inf)
        return replace(candidate, mel=candidate.mel.detach()), value, gradients


@torch.no_grad()
def drawn_noise(
    policy: Policy, prompts: Prompts, generator: Generators, *, cfg_strength: float
) -> tuple[list[Float[Tensor, "_ m"]], list[Bool[Tensor, " _"]]]:
    """The noise that policy.rollout would begin each prompt with, and which of its frames are generated."""
    prompts = with_durations(policy, prompts)
    generators = item_generators(generator, len(prompts))
    noise: dict[int, Tensor] = {}
    free: dict[int, Tensor] = {}
    with evaluating(policy):
        for rows in rows_by_duration(prompts):
            cond = policy.encode(prompts.select(rows), cfg_strength=cfg_strength)
            x0 = policy.prior(cond, of_rows(generators, rows))
            noise |= dict(zip(rows, x0, strict=True))
            free |= dict(zip(rows, cond.generated, strict=True))
    return [noise[row] for row in range(len(prompts))], [free[row] for row in range(len(prompts))]


@torch.no_grad()
def moved(
    x0: Float[Tensor, "n m"], gradient: Float[Tensor, "n m"], free: Bool[Tensor, " n"], size: float, prior: str
) -> Float[Tensor, "n m"]:
    """x_0 after one step of `size` along the gradient, in the frames `free` only; see the top.

    A gradient that is not finite, or zero, moves nothing.
    """
    x, h = x0[free], gradient[free]
    if prior == "sphere":
        h = h - (h * x).sum() / x.square().sum() * x
    if not bool(h.isfinite().all()) or not bool(h.any()):
        return x0.detach()
    ahead = h / h.norm()
    if prior == "sphere":
        x = math.cos(size) * x + math.sin(size) * x.norm() * ahead
    else:
        x = x + size * math.sqrt(x.numel()) * ahead
    return x0.masked_scatter(free.unsqueeze(-1), x)
