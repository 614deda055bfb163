"""AWM, Advantage Weighted Matching: the policy gradient with the flow-matching loss for log-probability.

    log p_theta(x_1; t, x_0) = -w(t) |v_theta - u|^2         a bound on the log-density of x_1, a mean over its elements
    ratio = exp(log p_theta - log p_old),                    both at the same times and noise
    loss = mean_i mean_draws [max(-A ratio, -A clip(ratio))] + beta mean |v_theta - v_ref|^2
                                                             + ema_beta mean |v_theta - v_ema|^2

In the first update on a collection every ratio is 1 and the gradient is that of A w |v_theta - u|^2: the loss of
pretraining, weighted by the advantage, of either sign. A negative weight has no minimum, so what bounds the steps is
the clip and the average of the weights that v_ema runs on; the latter does not move the optimum, since it follows.

Weights: "uniform" w = 1; "noise" w = 1 - t; "ghuber" log p = -(1 - t) ((m + d)^q - d^q) / q of m = |v_theta - u|^2,
with q = 1/4, d = 1e-10, which the repository runs with. The anchor has no weights of time.

Reference: Xue et al. 2025, Advantage Weighted Matching, arXiv 2509.25050, and its repository (defaults). That one
divides A by its clip, 5: its beta 0.003 (GenEval, OCR) and ema_beta 1 are 0.015 and 5 here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.base import Clip, LaggedAlgorithm
from rlhf_mel.algorithms.families.forward_process import (
    Draw,
    ForwardProcessOptions,
    Samples,
    anchored_loss,
    check_number,
    collect_samples,
    regress,
)
from rlhf_mel.algorithms.families.policy_gradient import check_clipping, clipped_shares, clipped_surrogate
from rlhf_mel.flow.ema import MovingAverage, check_lag
from rlhf_mel.flow.noise import seeded
from rlhf_mel.masked import kept_mean
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.types import Prompts

WEIGHTINGS = ("uniform", "noise", "ghuber")


GHUBER_POWER = 0.25


GHUBER_OFFSET = 1e-10


def matching_log_prob(error: Float[Tensor, " b"], t: Float[Tensor, " b"], weighting: str) -> Float[Tensor, " b"]:
    """log p of mean square errors `error` of the velocity at times t."""
    if weighting == "uniform":
        return -error
    if weighting == "noise":
        return -(1 - t) * error
    root: Tensor = (error + GHUBER_OFFSET) ** GHUBER_POWER - GHUBER_OFFSET**GHUBER_POWER
    return -(1 - t) * root / GHUBER_POWER


@dataclass
class RatioSamples:
    """Rollouts, and what the ratios of all updates on them compare."""

    samples: Samples
    noise_seed: int
    """Of the times and noise: the same in every update on these samples."""
    average: MovingAverage | None
    """The policy on the average of its weights; None: nothing is tied to it."""
    old_log_probs: Float[Tensor, "draws b"] | None = None
    """From the first of those updates on, when the policy is still the one that made the rollouts."""


class AWM(LaggedAlgorithm):
    """PPO with the flow-matching loss for log-probability; see the top."""

    name = "awm"
    needs_groups = True
    default_beta = 0.015

    @dataclass(frozen=True, kw_only=True)
    class Config(ForwardProcessOptions):
        """The family's, log-probability, clipping, and the average of the weights."""

        num_noise_samples: int = 6
        """Draws of time and noise for each rollout and update. Paper: 6."""
        weighting: str = "uniform"
        """Of times: 'uniform', 'noise' or 'ghuber'."""
        epsilon: float = 1.0
        """Clip range of the ratio. The repository's: 1."""
        epsilon_high: float | None = None
        """Upper clip range; null: epsilon."""
        ema_beta: float = 5.0
        """Weight of what ties the policy to the average of its weights; 0: no average is kept."""
        ema_decay_rate: float = 0.001
        """Growth of the average's decay an update. The repository's: 0.001."""
        ema_decay_max: float = 0.3
        """Its limit, below 1. The repository's: 0.3."""

        def __post_init__(self) -> None:
            self.check("awm")
            check_clipping("awm", self.epsilon, self.epsilon_high, self.advantage_clip)
            check_lag("awm", self.ema_decay_rate, self.ema_decay_max, prefix="ema")
            check_number("awm", "ema_beta", self.ema_beta, least=0.0)
            if self.weighting not in WEIGHTINGS:
                raise ValueError(f"weighting of awm: expected one of {list(WEIGHTINGS)}, got {self.weighting!r}")

    config: Config

    @property
    @override
    def clip(self) -> Clip:
        return Clip.of(self.config.epsilon, self.config.epsilon_high)

    @override
    def lag(self) -> tuple[float, float]:
        return self.config.ema_decay_rate, self.config.ema_decay_max

    @override
    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> RatioSamples:
        average = self._lagged.refreshed(pipeline.policy) if self.config.ema_beta else None
        samples = collect_samples(pipeline, prompts, generator, self.config)
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        return RatioSamples(samples=samples, noise_seed=seed, average=average)

    @override
    def loss(
        self, pipeline: Pipeline, collected: RatioSamples, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        samples = collected.samples
        log_probs = samples.advantages.new_empty(self.config.num_noise_samples, len(samples.advantages))
        objective = partial(self._values, old_log_probs=collected.old_log_probs, log_probs=log_probs)
        noise = seeded(collected.noise_seed, generator.device)
        others = {"reference": pipeline.reference, "ema": collected.average}
        values = regress(pipeline.policy, samples, objective, self.config, noise, **others)
        if collected.old_log_probs is None:
            collected.old_log_probs = log_probs
        loss = kept_mean(values.pop("surrogate"), samples.dropped)
        return anchored_loss(loss, samples, values, anchor=self.beta, ema_deviation=self.config.ema_beta)

    def _values(self, draw: Draw, *, old_log_probs: Tensor | None, log_probs: Tensor) -> dict[str, Tensor]:
        """`log_probs` [n, B] is filled in."""
        rows, clip = list(draw.rows), self.clip
        log_prob = matching_log_prob(draw.mse(draw.velocity, draw.target), draw.t, self.config.weighting)
        log_probs[draw.index, rows] = log_prob.detach()
        old = log_prob.detach() if old_log_probs is None else old_log_probs[draw.index, rows]
        ratio = (log_prob - old).exp()
        values = {"surrogate": clipped_surrogate(ratio, draw.advantages, clip), **draw.anchors()}
        if "ema" in draw.others:
            values["ema_deviation"] = draw.mse(draw.velocity, draw.others["ema"])
        return values | clipped_shares(ratio.detach()[None], draw.advantages, clip)


algorithm = AWM
