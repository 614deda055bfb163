"""RAM, Reinforce Adjoint Matching: regress the reference's velocity, corrected by the reward.

    loss = beta mean_i |v_theta - sg(v_ref + A_i / beta (u - v_old))|^2                  beta times their equation 17

The problem is max E[A] - beta KL(p || p_ref) over processes. Its solution tilts what is generated and leaves the
noising of it as it is, so the condition of Adjoint Matching holds at noised samples, and REINFORCE turns the gradient
of the reward in it into a covariance, v_theta - v_ref = E[A (u - v_theta) | x_t] / beta: no gradient of the reward, no
adjoint to solve. What is left out is the cost of the path between t and the end; for Gaussian mels and a linear
reward the point of rest is still the mean of p_ref exp(A / beta).

The factor beta keeps the size of a gradient that of A, as in the other algorithms: half of it by v_theta is
beta (v_theta - v_ref) - A (u - v_old), mean zero at the optimum but never small, which asks for small learning rates.

v_old is the policy that spoke (see ema.LaggedPolicy; with old_decay_max 0 it is v_theta, as in the equation). Rollouts
may be guided, the regressed velocity is not: loss_cfg_strength is 0 here, as in the paper's experiments.

Reference: Bergmeister et al. 2026, Reinforce Adjoint Matching, arXiv 2605.10759: equation 17, algorithm 1; the
reward's factor 1 / beta is 100 for GenEval and OCR and 1000 for PickScore, in advantages over the batch's deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.families.forward_process import (
    Draw,
    ForwardProcessOptions,
    LaggedSamples,
    OldPolicyAlgorithm,
    anchored_loss,
)
from rlhf_mel.flow.ema import check_lag
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline


def ram_target(draw: Draw, beta: float) -> Float[Tensor, "b n m"]:
    """v_ref + A / beta (u - v_old)."""
    shift = draw.target - draw.others["old"]
    return draw.others["reference"] + (draw.advantages / beta)[:, None, None] * shift


class RAM(OldPolicyAlgorithm):
    """Regression of the reference's velocity, corrected by the advantage; see the top."""

    name = "ram"
    needs_groups = True
    default_beta = 0.01

    @dataclass(frozen=True, kw_only=True)
    class Config(ForwardProcessOptions):
        """The family's with the paper's defaults, and how the old policy follows."""

        num_noise_samples: int = 8
        """Draws of time and noise for each rollout and update. Paper: 8."""
        time_power: float = 1.0
        """Times are drawn with density (1 + p) (1 - t)^p: 0 is uniform, above 0 prefers noise. Paper: 1."""
        loss_cfg_strength: float | None = 0.0
        """Guidance of the velocity that is regressed; null: that of the rollouts. Paper: none."""
        advantage_clip: float = float("inf")
        """Largest size of an advantage. Paper: no limit."""
        old_decay_rate: float = 0.01
        """Growth of the old policy's decay an update. Paper: 0.01."""
        old_decay_max: float = 0.9
        """Its limit, below 1; 0: the old policy is the one of the last update. Paper: 0.9."""

        def __post_init__(self) -> None:
            self.check("ram")
            check_lag("ram", self.old_decay_rate, self.old_decay_max)

    config: Config

    def __init__(self, config: Config | None = None, *, beta: float = default_beta) -> None:
        super().__init__(config, beta=beta)

    @override
    def check(self, pipeline: Pipeline) -> None:
        if pipeline.reference is None or not self.beta > 0:
            raise ValueError(
                f"algorithm 'ram' regresses the reference's velocity: expected beta above 0, got {self.beta:g}; "
                f"{self.default_beta:g} is the paper's"
            )

    @override
    def loss(
        self, pipeline: Pipeline, collected: LaggedSamples, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        samples, values = collected.samples, self.regressed(pipeline, collected, self._values, generator)
        loss = self.beta * values.pop("ram_loss").mean()  # without a reward A is 0: those rows are anchored only
        return anchored_loss(loss, samples, values)

    def _values(self, draw: Draw) -> dict[str, Tensor]:
        loss = draw.mse(draw.velocity, ram_target(draw, self.beta))
        return {"ram_loss": loss, "old_deviation": draw.mse(draw.velocity, draw.others["old"]), **draw.anchors()}


algorithm = RAM
