"""Flow-DPO: of two clips of one prompt, fit the preferred one better than the reference does, and the other one worse.

    z = r(chosen) - r(rejected) - margin_scale margin                      r: implicit rewards, see families/pairs.py
    loss = mean of -p log sigma(z) - (1 - p) log sigma(-z) + sft_weight mean of |v_theta - u|^2(chosen)

p, the soft label, is the share of the votes for the chosen clip (Conservative DPO); without votes it is 1, and the
first term the paper's. The means are over pairs by their weight, sum w (...) / sum w in a micro-batch
(families/pairs.py), and over draws of time and noise outside of log sigma, as in the paper.

At the start z is 0 and the loss log 2 (without margins), whatever the weights. Its gradient is then (p - 1/2) beta / 2
times that of the chosen clip's error less the rejected one's: with beta 2000 and p = 1 the chosen one's error has the
weight 500, which is what sft_weight has to be compared with. The first term also falls where both clips fit worse and
the rejected one more, so watch `chosen_error`; sft_weight holds it down (RPO; Reg-DPO found that video models need it).

On a data set: --train_preferences PATH. On the policy's own rollouts, ranked by the rewards:
--algorithm_kwargs '{"online": true}' --num_generations 8 --num_iterations 4.

References: Liu et al. 2025, arXiv 2501.13918; margins: Amini et al. 2024, ODPO, arXiv 2402.10571; the second term: Pang
et al. 2024, RPO, arXiv 2404.19733, and Du et al. 2025, Reg-DPO, arXiv 2511.01450; soft labels: Mitchell 2023, A note on
DPO with noisy preferences. PNAPO's schedule of beta by margin and progress is not here; its stored noise is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.families.forward_process import check_number
from rlhf_mel.algorithms.families.pairs import (
    PairAlgorithm,
    Pairs,
    PairTrainingOptions,
    check_columns,
    fit_metrics,
    reward_metrics,
    weighted_mean,
)
from rlhf_mel.data.preferences.load import PreferenceDataset
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline


def dpo_loss(
    margins: Float[Tensor, "n b"], soft_labels: Float[Tensor, " b"], label_smoothing: float = 0.0
) -> Float[Tensor, "n b"]:
    """-p log sigma(z) - (1 - p) log sigma(-z) of margins z; p: the label, after (1 - 2 smoothing) p + smoothing."""
    p = (1 - 2 * label_smoothing) * soft_labels + label_smoothing
    return -p * F.logsigmoid(margins) - (1 - p) * F.logsigmoid(-margins)


class FlowDPO(PairAlgorithm):
    """Bradley-Terry on implicit rewards; see the top."""

    name = "flow_dpo"

    @dataclass(frozen=True, kw_only=True)
    class Config(PairTrainingOptions):
        """The family's, and what is made of labels."""

        label_smoothing: float = 0.0
        """Share of labels that are believed to be wrong, below 1/2: p becomes (1 - 2 e) p + e."""
        margin_scale: float = 0.0
        """What a unit of the data set's `margin` (online: of the reward) asks of the implicit rewards' difference."""
        sft_weight: float = 0.0
        """Weight of the chosen clip's own error; 500 is as much as the preference pulls on it at the start."""

        def __post_init__(self) -> None:
            self.check("flow_dpo")
            for option in ("label_smoothing", "margin_scale", "sft_weight"):
                check_number("flow_dpo", option, getattr(self, option), least=0.0)
            if not self.label_smoothing < 0.5:
                raise ValueError(f"label_smoothing of flow_dpo: expected below 0.5, got {self.label_smoothing}")

    config: Config

    @override
    def check_pairs(self, preferences: PreferenceDataset) -> None:
        super().check_pairs(preferences)
        if self.config.margin_scale:
            check_columns(preferences, ["margin"], f"margin_scale of {self.name}")

    @override
    def loss(
        self, pipeline: Pipeline, collected: Pairs, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        config, weights = self.config, collected.weights
        fit = self.fit(pipeline, collected.clips, generator)
        chosen, rejected = fit.rewards(self.beta).chunk(2, dim=1)
        z = chosen - rejected
        if config.margin_scale:
            z = z - config.margin_scale * collected.margins
        loss = weighted_mean(dpo_loss(z, collected.soft_labels, config.label_smoothing), weights)
        if config.sft_weight:
            loss = loss + config.sft_weight * weighted_mean(fit.errors.chunk(2, dim=1)[0], weights)
        return loss, {**collected.metrics, **reward_metrics(chosen, rejected), **fit_metrics(fit)}


algorithm = FlowDPO
