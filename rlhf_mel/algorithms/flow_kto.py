"""Flow-KTO: each clip by itself is good or bad, and is to fit better, or worse, than a reference point.

    z_0 = max(0, mean of r over the batch), without gradient               r: implicit rewards, families/clip_fit.py
    loss = mean by weight of lambda (1 - U(r - z_0)) of desirable clips, lambda (1 - U(z_0 - r)) of undesirable ones

U is the utility: "kahneman_tversky" sigma(x), whose gradient fades for gains and for losses alike; "loss_averse" log
sigma(x), which goes on pulling at what fits badly; "risk_seeking" -log sigma(-x), which goes on at what fits well.

A pair of a data set is two labels: the chosen clip is desirable with the probability of the soft label, the rejected
one with the rest. With `online` the labels are unpaired: a rollout is desirable if its reward is above the mean of its
group. z_0 is that of one device's batch, as advantages scaled by the batch are; KTO estimates it from clips and prompts
that do not belong together, Diffusion-KTO as here.

Their repository writes beta without the half, so its number is half of the beta here.

References: Li et al. 2024, Diffusion-KTO, arXiv 2404.04465, and its repository (reference point, utilities); Ethayarajh
et al. 2024, KTO, arXiv 2402.01306 (weights). Names: TRL's KTOTrainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.families.clip_fit import Clips, Fit
from rlhf_mel.algorithms.families.forward_process import check_number
from rlhf_mel.algorithms.families.pairs import (
    PairAlgorithm,
    PairTrainingOptions,
    pairs_of,
    sampled_clips,
    weighted_mean,
)
from rlhf_mel.data.preferences.load import PairBatch
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts

UTILITIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "kahneman_tversky": torch.sigmoid,
    "loss_averse": F.logsigmoid,
    "risk_seeking": lambda x: -F.logsigmoid(-x),
}
"""Name to U."""


@dataclass(frozen=True, kw_only=True)
class LabelledClips:
    """c clips that several updates learn from, each with a label of its own."""

    clips: Clips
    desirable: Float[Tensor, " c"]
    """Probability that a clip is good."""
    weights: Float[Tensor, " c"]
    """0: the clip teaches nothing."""
    metrics: Mapping[str, Tensor]
    """What to log with every update that they are used for."""


def reference_point(rewards: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """z_0 = max(0, mean r), without gradient."""
    return rewards.detach().mean().clamp(min=0)


def kto_loss(
    gains: Float[Tensor, "n c"], desirable: Float[Tensor, " c"], *, utility: str, weights: tuple[float, float]
) -> Float[Tensor, "n c"]:
    """d lambda_D (1 - U(x)) + (1 - d) lambda_U (1 - U(-x)) of gains x = r - z_0; `weights`: lambda_D, lambda_U."""
    of_desirable, of_undesirable = weights
    worth = UTILITIES[utility]
    return desirable * of_desirable * (1 - worth(gains)) + (1 - desirable) * of_undesirable * (1 - worth(-gains))


class FlowKTO(PairAlgorithm):
    """Utilities of single clips; see the top."""

    name = "flow_kto"

    @dataclass(frozen=True, kw_only=True)
    class Config(PairTrainingOptions):
        """The family's, and what a label is worth."""

        utility: str = "kahneman_tversky"
        """'kahneman_tversky', 'loss_averse' or 'risk_seeking'. Diffusion-KTO: the first."""
        desirable_weight: float = 1.0
        """Weight of desirable clips; raise it where there are fewer of them. TRL: 1."""
        undesirable_weight: float = 1.0
        """Weight of undesirable clips. TRL: 1."""

        def __post_init__(self) -> None:
            self.check("flow_kto")
            for option in ("desirable_weight", "undesirable_weight"):
                check_number("flow_kto", option, getattr(self, option), least=0.0)
            if self.utility not in UTILITIES:
                raise ValueError(f"utility of flow_kto: expected one of {list(UTILITIES)}, got {self.utility!r}")

    config: Config

    @override
    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> LabelledClips:
        clips, samples = sampled_clips(pipeline, prompts, generator, self.config)
        differs = samples.advantages != 0  # 0 of those without a reward, too
        return LabelledClips(
            clips=clips,
            desirable=(samples.advantages > 0).float(),
            weights=differs.float(),
            metrics={**samples.metrics, "dropped_clips": ~differs},
        )

    @override
    def collect_pairs(self, pipeline: Pipeline, pairs: PairBatch, generator: torch.Generator) -> LabelledClips:
        of_data = pairs_of(pipeline.policy, pairs, self.config)
        return LabelledClips(
            clips=of_data.clips,
            desirable=torch.cat([of_data.soft_labels, 1 - of_data.soft_labels]),
            weights=of_data.weights.repeat(2),
            metrics=of_data.metrics,
        )

    @override
    def loss(
        self, pipeline: Pipeline, collected: LabelledClips, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        config, fit = self.config, self.fit(pipeline, collected.clips, generator)
        rewards = fit.rewards(self.beta)
        point = reference_point(rewards)
        of_labels = config.desirable_weight, config.undesirable_weight
        losses = kto_loss(rewards - point, collected.desirable, utility=config.utility, weights=of_labels)
        metrics = label_metrics(fit, rewards.detach(), collected) | {"reference_point": point}
        return weighted_mean(losses, collected.weights), {**collected.metrics, **metrics}


def label_metrics(fit: Fit, rewards: Float[Tensor, "n c"], collected: LabelledClips) -> Metrics:
    """TRL's names: implicit rewards of the good clips and of the bad ones; `rewards/margins` is their difference."""
    rewards, errors, good = rewards.mean(0), fit.errors.detach().mean(0), collected.desirable > 0.5
    counted = collected.weights != 0
    chosen, rejected = good & counted, ~good & counted
    return {
        "rewards/chosen": rewards[chosen],
        "rewards/rejected": rewards[rejected],
        "rewards/margins": rewards[chosen].mean() - rewards[rejected].mean(),
        "chosen_error": errors[chosen],
        "rejected_error": errors[rejected],
        "anchor": fit.anchors.detach().mean(0),
    }


algorithm = FlowKTO
