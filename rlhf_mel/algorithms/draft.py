"""DRaFT-K: follow the gradient of the reward through the last K steps of sampling.

    loss = -mean_B r(vocoder(x_1)) + beta mean_B anchor,    d x_1 / d theta through the last K velocities only

The state before those K steps is a constant. K = 1 already learns, and is the cheapest: memory and backward time
are those of one step. With K = all steps it is AlignProp with a fixed truncation (arXiv 2310.03739).

Reference: Clark et al. 2023, Directly Fine-Tuning Diffusion Models on Differentiable Rewards, arXiv 2309.17400.
The anchor to the reference policy: see base.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.base import AlgorithmBase
from rlhf_mel.algorithms.families.pathwise import check_grad_steps, draft_loss, pathwise_scores
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts


class Draft(AlgorithmBase):
    """The reward's gradient through the last K steps; see the top."""

    name = "draft"
    reward_gradient = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How far back the gradient goes."""

        grad_steps: int | None = 1
        """K: velocities that are differentiated, counted from the end; None: all. Paper: 1 works best."""

        def __post_init__(self) -> None:
            if self.grad_steps is not None and (not isinstance(self.grad_steps, int) or self.grad_steps < 1):
                raise ValueError(
                    f"grad_steps of draft: expected a whole number of at least 1, or null for all, "
                    f"got {self.grad_steps!r}"
                )

    config: Config

    @override
    def check(self, pipeline: Pipeline) -> None:
        super().check(pipeline)
        check_grad_steps("grad_steps of draft", self.config.grad_steps or 0, pipeline)

    @override
    def loss(
        self, pipeline: Pipeline, collected: Prompts, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        grad_steps = self.config.grad_steps or pipeline.sampling.steps
        rollouts, anchor = pipeline.rollout(collected, generator, grad_steps=grad_steps)
        rewards, metrics = pathwise_scores(pipeline, rollouts, collected)
        return draft_loss(rewards, anchor, self.beta), metrics | {"anchor": anchor.detach()}


algorithm = Draft
