"""The loss of an update as a module: what Accelerate wraps."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_mel.algorithms.base import Algorithm
from rlhf_mel.data.preferences.load import PairBatch
from rlhf_mel.flow.noise import item_generators, mix_seed, seeded
from rlhf_mel.flow.policy import with_durations
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts

TIMING = 2
"""Tells the seed of a micro-batch's rhythms from that of its noise."""


class UpdateLoss(nn.Module):
    """The loss of an update as a module: what Accelerate wraps. Its only child is the policy."""

    accepts_loss_kwargs = False  # a mean over the batch: the Trainer divides it by gradient_accumulation_steps

    def __init__(self, algorithm: Algorithm, pipeline: Pipeline) -> None:
        super().__init__()
        self.policy = pipeline.policy
        self.algorithm = algorithm
        self.pipeline = pipeline  # no nn.Module: whatever is frozen stays out of parameters() and state_dict()

    @torch.no_grad()
    def collect(self, batch: Prompts | PairBatch, noise_seed: int) -> Any:
        """What the algorithm learns from (`Algorithm.collect` or `collect_pairs`), with noise of that seed.

        Rhythms of prompts are drawn here; clips of a data set have theirs.
        """
        if isinstance(batch, PairBatch):
            return self.algorithm.collect_pairs(self.pipeline, batch, seeded(noise_seed))
        rhythm = item_generators(seeded(mix_seed(noise_seed, TIMING)), len(batch))
        return self.algorithm.collect(self.pipeline, with_durations(self.policy, batch, rhythm), seeded(noise_seed))

    def forward(self, collected: Any, noise_seed: int) -> dict[str, Float[Tensor, ""] | Metrics]:
        """`loss` and `metrics` of what was collected, with noise of that seed."""
        loss, metrics = self.algorithm.loss(self.pipeline, collected, seeded(noise_seed))
        return {"loss": loss, "metrics": metrics}
