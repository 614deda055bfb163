"""DiffusionNFT: what is better attracts, what is worse repels, by flow matching on both sides of the old policy.

    v+ = (1 - b) v_old + b v_theta,    v- = (1 + b) v_old - b v_theta                               (their section 3.2)
    p_i = (1 + A_i / c) / 2 of [0, 1]                    c: advantage_clip; the "optimality probability" of a rollout
    loss = (c / b) mean_i [p_i |v+ - u|^2 + (1 - p_i) |v- - u|^2] + beta mean_i |v_theta - v_ref|^2

Half its gradient with respect to v_theta is A_i (v_old - u) + c b (v_theta - v_old): away from u or towards it, held to
the old policy by c b. So against a fixed old policy the optimum is v_old + E[A (u - v_old) | x_t] / (c b), which is the
paper's v_old + (2 / b) E[(p - 1/2) (u - v_old) | x_t], and as the old policy follows, the anchor alone decides where
both end.

Rollouts are the old policy's (see ema.LaggedPolicy). With `adaptive_weighting`, as in the paper's experiments, both
errors are those of the mel that a velocity points to, x_t + (1 - t) v, divided by their own mean size:

    |e|^2  ->  (1 - t) mean e^2 / sg(mean |e|),    e = v+ - u or v- - u

Reference: Zheng et al. 2025, DiffusionNFT, arXiv 2509.16117; factor c / b, c = 5, decay schedule, beta and
adaptive weights as in its repository, NVlabs/DiffusionNFT.
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
    check_positive,
)
from rlhf_mel.flow.ema import check_lag
from rlhf_mel.masked import counted_mean, kept_mean
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline

LEAST_ERROR = 1e-5
"""Of a predicted mel, in the adaptive weight; the repository's."""


def nft_loss(draw: Draw, *, strength: float, advantage_clip: float, adaptive: bool) -> Float[Tensor, " b"]:
    """(c / b) (p |v+ - u|^2 + (1 - p) |v- - u|^2) of each sample."""
    old, step = draw.others["old"], strength * (draw.velocity - draw.others["old"])
    probability = (1 + draw.advantages / advantage_clip) / 2
    attracted = squared_error(draw, old + step, adaptive)
    repelled = squared_error(draw, old - step, adaptive)
    return advantage_clip / strength * (probability * attracted + (1 - probability) * repelled)


def squared_error(draw: Draw, v: Float[Tensor, "b n m"], adaptive: bool) -> Float[Tensor, " b"]:
    """Mean of (v - u)^2; `adaptive`: of the predicted mel's square error, over its mean absolute error."""
    if not adaptive:
        return draw.mse(v, draw.target)
    size = counted_mean((v - draw.target).abs(), draw.counted).detach()
    remaining = 1 - draw.t
    return remaining.square() * draw.mse(v, draw.target) / (remaining * size).clamp(min=LEAST_ERROR)


class DiffusionNFT(OldPolicyAlgorithm):
    """Flow matching on both sides of the old policy; see the top."""

    name = "diffusion_nft"
    needs_groups = True
    default_beta = 1e-4

    @dataclass(frozen=True, kw_only=True)
    class Config(ForwardProcessOptions):
        """The family's, how far the two sides are apart, and how the old policy follows."""

        strength: float = 1.0
        """b: below 1, larger steps from the old policy. Paper: 1, for OCR 0.1."""
        adaptive_weighting: bool = True
        """Square errors of the predicted mel over their mean size; false: those of the velocity."""
        old_decay_rate: float = 0.001
        """Growth of the old policy's decay an update. Paper: 0.001."""
        old_decay_max: float = 0.5
        """Its limit, below 1; 0: the old policy is the one of the last update. Paper: 0.5."""

        def __post_init__(self) -> None:
            self.check("diffusion_nft")
            check_positive("diffusion_nft", "strength", self.strength)
            check_lag("diffusion_nft", self.old_decay_rate, self.old_decay_max)
            if self.advantage_clip == float("inf"):
                raise ValueError(
                    "advantage_clip of diffusion_nft: expected a finite number, which makes A a probability"
                )

    config: Config

    @override
    def loss(
        self, pipeline: Pipeline, collected: LaggedSamples, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        samples, values = collected.samples, self.regressed(pipeline, collected, self._values, generator)
        loss = kept_mean(values.pop("nft_loss"), samples.dropped)
        return anchored_loss(loss, samples, values, anchor=self.beta)

    def _values(self, draw: Draw) -> dict[str, Tensor]:
        config = self.config
        loss = nft_loss(
            draw,
            strength=config.strength,
            advantage_clip=config.advantage_clip,
            adaptive=config.adaptive_weighting,
        )
        return {"nft_loss": loss, "old_deviation": draw.mse(draw.velocity, draw.others["old"]), **draw.anchors()}


algorithm = DiffusionNFT
