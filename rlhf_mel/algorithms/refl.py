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
from torch import Tensor

from rlhf_mel.algorithms.base import AlgorithmBase
from rlhf_mel.algorithms.families.pathwise import pathwise_scores
from rlhf_mel.masked import finite_mean
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline, require_reward_gradient
from rlhf_mel.types import Prompts


def refl_loss(rewards: Tensor, anchor: Tensor, beta: float, margin: float | None) -> Tensor:
    """mean(phi(rewards [B]), the finite ones) + beta mean(anchor [B])."""
    phi = -rewards if margin is None else torch.relu(margin - rewards)
    return finite_mean(phi) + beta * anchor.mean()


def window_start(steps: int, window: float) -> int:
    """First of the steps [start, steps) that make up the last `window` of the grid; at least the last one."""
    return min(steps - 1, steps - round(window * steps))


class Refl(AlgorithmBase):
    name = "refl"
    reward_gradient = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        window: float = 0.25
        """Share of the steps, counted from the end, that the jump may start from. Paper: 10 of 40."""
        margin: float | None = None
        """Reward above which a rollout has no gradient; None: no limit. Paper: 2, in its reward's unit."""

        def __post_init__(self) -> None:
            if not isinstance(self.window, int | float) or not 0 < self.window <= 1:
                raise ValueError(f"window of refl: expected a share above 0 and up to 1, got {self.window!r}")
            if self.margin is not None and not isinstance(self.margin, int | float):
                raise ValueError(f"margin of refl: expected a reward or null, got {self.margin!r}")

    def __init__(self, config: Config | None = None, *, beta: float = 0.0) -> None:
        self.config = config or self.Config()
        self.beta = beta

    def check(self, pipeline: Pipeline) -> None:
        require_reward_gradient(self.name, pipeline)

    def loss(self, pipeline: Pipeline, collected: Prompts, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        steps = pipeline.sampling.steps
        start = window_start(steps, self.config.window)
        step = int(torch.randint(start, steps, (), generator=generator))
        spoken, anchor = pipeline.rollout(collected, generator, grad_steps=1, jump_from=step)
        rewards, metrics = pathwise_scores(pipeline, spoken, collected)
        loss = refl_loss(rewards, anchor, self.beta, self.config.margin)
        return loss, metrics | {"anchor": anchor.detach(), "jump_step": torch.tensor(float(step))}


algorithm = Refl
