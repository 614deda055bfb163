"""ORW-CFM-W2: online reward-weighted flow matching, anchored in Wasserstein-2 distance.

    w_i = exp(tau A_i) / mean_j exp(tau A_j);    loss = mean_i w_i |v_theta - u|^2 + beta mean_i |v_theta - v_ref|^2

Each update fits the policy to its own samples, the better ones counted more: p_{k+1} ~ p_k w. Without the anchor
nothing holds that: the policy ends as a point at the maximum of the reward, or grows for ever where there is none.
The anchor bounds W_2^2 between what the two flows generate. For Gaussian mels and a linear reward the two meet in the
mean of p_ref exp(tau A / beta).

The paper's weight is exp(tau r). Dividing it by its mean, over the group of a prompt or over the batch, keeps prompts
that are easy, and constants in a reward, from deciding the size of a step and what the anchor weighs against.

The weights are 1 on average, so what the rollouts have in common is learnt too: with guided rollouts and
loss_cfg_strength 0, the guidance itself, which an evaluation with guidance would then apply twice.

Reference: Fan et al. 2025, Online Reward-Weighted Fine-Tuning of Flow Matching with Wasserstein Regularization,
arXiv 2502.06061.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.base import AlgorithmBase
from rlhf_mel.algorithms.families.forward_process import (
    Draw,
    ForwardProcessOptions,
    Samples,
    anchored_loss,
    check_positive,
    collect_samples,
    regress,
)
from rlhf_mel.masked import kept_mean
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts

NORMALIZATIONS = ("group", "batch")


def reward_weights(
    advantages: Float[Tensor, " b"], group_ids: Int[Tensor, " b"], dropped: Bool[Tensor, " b"], tau: float
) -> Float[Tensor, " b"]:
    """exp(tau A) over its mean in the group, over the rows that are not dropped; 0 for those that are."""
    weights = torch.zeros_like(advantages)
    for group in torch.unique(group_ids):
        members = (group_ids == group) & ~dropped
        weights[members] = (tau * advantages[members]).softmax(0) * members.sum()
    return weights


def effective_share(weights: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """(sum w)^2 / (b sum w^2): the share of the b rollouts that the weights let count; 1 where all are equal."""
    return weights.sum().square() / (len(weights) * weights.square().sum()).clamp(min=1e-12)


class OrwCFM(AlgorithmBase):
    """Flow matching to the policy's own samples, weighted by their rewards; see the top."""

    name = "orw_cfm"
    default_beta = 1.0

    @dataclass(frozen=True, kw_only=True)
    class Config(ForwardProcessOptions):
        """The family's, and how samples are weighted."""

        tau: float = 1.0
        """How much more a better rollout counts: exp(tau) times for an advantage of 1. Paper: a temperature to tune."""
        normalize_weights: str = "group"
        """Rollouts that share a mean weight and the baseline of advantages: those of a 'group', or of the 'batch'."""

        def __post_init__(self) -> None:
            self.check("orw_cfm")
            check_positive("orw_cfm", "tau", self.tau)
            if self.normalize_weights not in NORMALIZATIONS:
                raise ValueError(
                    f"normalize_weights of orw_cfm: expected one of {list(NORMALIZATIONS)}, "
                    f"got {self.normalize_weights!r}"
                )

    config: Config

    @override
    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> Samples:
        across_groups = self.config.normalize_weights == "batch"
        samples = collect_samples(pipeline, prompts, generator, self.config, across_groups=across_groups)
        if len(torch.unique(samples.group_ids)) == len(samples.group_ids):
            raise ValueError(
                f"algorithm 'orw_cfm' with normalize_weights {self.config.normalize_weights!r} compares nothing: "
                f"expected rollouts that share a group, got {len(samples.group_ids)} groups of one; raise "
                "num_generations, or normalize by 'batch'"
            )
        return samples

    @override
    def loss(
        self, pipeline: Pipeline, collected: Samples, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        policy, reference = pipeline.policy, pipeline.reference
        values = regress(policy, collected, self._values, self.config, generator, reference=reference)
        weights = reward_weights(collected.advantages, collected.group_ids, collected.dropped, self.config.tau)
        loss = kept_mean(weights * values["flow_matching_loss"], collected.dropped)
        loss, metrics = anchored_loss(loss, collected, values, anchor=self.beta)
        return loss, metrics | {"effective_share": effective_share(weights)}

    def _values(self, draw: Draw) -> dict[str, Tensor]:
        return {"flow_matching_loss": draw.mse(draw.velocity, draw.target), **draw.anchors()}


algorithm = OrwCFM
