"""ReFL: reward feedback on a mel predicted in one step from a late, random time.

    x_t by k steps without gradient;   x_1 = x_t + (1 - t) v(x_t, t);   loss = mean_B phi(r(vocoder(x_1))) + beta anchor

k is drawn anew for each batch from the last part of the grid, so every late time is trained, where DRaFT-1 trains
the last one. phi(r) = -r, or ReFL's relu(margin - r): a rollout that is good enough teaches nothing more.

Reference: Xu et al. 2023, ImageReward, arXiv 2304.05977 (their margin is 2, their window 10 of 40 steps; their
pretraining loss is replaced by the anchor of base.py, their factor 1e-3 by the learning rate).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.base import AlgorithmBase
from rlhf_mel.algorithms.families.pathwise import pathwise_scores
from rlhf_mel.masked import finite_mean
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts


def refl_loss(
    rewards: Float[Tensor, " b"], anchor: Float[Tensor, " b"], beta: float, margin: float | None
) -> Float[Tensor, ""]:
    """mean(phi(rewards), the finite ones) + beta mean(anchor)."""
    phi = -rewards if margin is None else torch.relu(margin - rewards)
    return finite_mean(phi) + beta * anchor.mean()


def window_start(steps: int, window: float) -> int:
    """First of the steps [start, steps) that make up the last `window` of the grid; at least the last one."""
    return min(steps - 1, steps - round(window * steps))


class Refl(AlgorithmBase):
    """The reward's gradient through one step to the end from a late, random time; see the top."""

    name = "refl"
    reward_gradient = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """From where the step is taken, and which rollouts teach."""

        window: float = 0.25
        """Share of the steps, counted from the end, that the jump may start from. Paper: 10 of 40."""
        margin: float | None = None
        """Reward above which a rollout has no gradient; None: no limit. Paper: 2, in its reward's unit."""

        def __post_init__(self) -> None:
            if not isinstance(self.window, int | float) or not 0 < self.window <= 1:
                raise ValueError(f"window of refl: expected a share above 0 and up to 1, got {self.window!r}")
            if self.margin is not None and not isinstance(self.margin, int | float):
                raise ValueError(f"margin of refl: expected a reward or null, got {self.margin!r}")

    config: Config

    @override
    def loss(
        self, pipeline: Pipeline, collected: Prompts, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        steps = pipeline.sampling.steps
        start = window_start(steps, self.config.window)
        step = int(torch.randint(start, steps, (), generator=generator))
        rollouts, anchor = pipeline.rollout(collected, generator, grad_steps=1, jump_from=step)
        rewards, metrics = pathwise_scores(pipeline, rollouts, collected)
        loss = refl_loss(rewards, anchor, self.beta, self.config.margin)
        return loss, metrics | {"anchor": anchor.detach(), "jump_step": torch.tensor(float(step))}


algorithm = Refl
