"""AlignProp: follow the gradient of the reward through a number of steps that is drawn anew for each batch of rollouts.

    K ~ Uniform{min_grad_steps, ..., max_grad_steps};   loss = -mean_B r(vocoder(x_1)) + beta mean_B anchor,
    d x_1 / d theta through the last K velocities only

It is DRaFT-K (see draft.py) with a random K. Through all steps the paper saw every prompt collapse to one sample within
two epochs; with a fixed K the early steps learn nothing, a random one reaches them all without that bias. A batch (a
micro-batch of the trainer) has one cut: the state before it is a constant, every step after it is in the chain. (The
AlignProp of TRL up to 0.23 drew a number in each step, and detached the step's velocity if its index was below: that
chain has holes.)

Reference: Prabhudesai et al. 2023, Aligning Text-to-Image Diffusion Models with Reward Backpropagation, arXiv
2310.03739, "Randomized truncated backpropagation": K ~ Uniform(0, 50) of 50 steps. K = 0 has no gradient: at least 1.
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


class AlignProp(AlgorithmBase):
    """DRaFT-K with a K drawn anew for each batch; see the top."""

    name = "alignprop"
    reward_gradient = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Between which numbers K is drawn."""

        min_grad_steps: int = 1
        """Fewest velocities that are differentiated, counted from the end."""
        max_grad_steps: int | None = None
        """Most of them; null: all steps, as in the paper."""

        def __post_init__(self) -> None:
            most = self.max_grad_steps
            if not isinstance(self.min_grad_steps, int) or self.min_grad_steps < 1:
                raise ValueError(
                    f"min_grad_steps of alignprop: expected a whole number of at least 1, got {self.min_grad_steps!r}"
                )
            if most is not None and (not isinstance(most, int) or most < self.min_grad_steps):
                raise ValueError(
                    f"max_grad_steps of alignprop: expected a whole number of at least min_grad_steps = "
                    f"{self.min_grad_steps}, or null for all, got {most!r}"
                )

    config: Config

    @override
    def check(self, pipeline: Pipeline) -> None:
        super().check(pipeline)
        most = self.config.max_grad_steps or self.config.min_grad_steps
        check_grad_steps("grad steps of alignprop", most, pipeline)

    @override
    def loss(
        self, pipeline: Pipeline, collected: Prompts, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        most = self.config.max_grad_steps or pipeline.sampling.steps
        grad_steps = int(torch.randint(self.config.min_grad_steps, most + 1, (), generator=generator))
        rollouts, anchor = pipeline.rollout(collected, generator, grad_steps=grad_steps)
        rewards, metrics = pathwise_scores(pipeline, rollouts, collected)
        logged = {"anchor": anchor.detach(), "grad_steps": torch.tensor(float(grad_steps))}
        return draft_loss(rewards, anchor, self.beta), metrics | logged


algorithm = AlignProp
