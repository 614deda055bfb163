"""Learn a reward from preferences: probability of an answer given two scores, and the loss of a pair.

With d = r(chosen) - r(rejected) and the worth exp(r) of a clip:

    none          P(chosen) = sigma(d)          P(rejected) = sigma(-d)
    rao_kupper    P(chosen) = sigma(d - eta)    P(rejected) = sigma(-d - eta)
                  P(tie) = (exp(2 eta) - 1) P(chosen) P(rejected)
    davidson      P(chosen) : P(rejected) : P(tie) = exp(d / 2) : exp(-d / 2) : nu

Bradley & Terry, "Rank analysis of incomplete block designs", Biometrika 39 (1952); Rao & Kupper, "Ties in
paired-comparison experiments", JASA 62 (1967), with theta = exp(eta) >= 1; Davidson, "On extending the Bradley-Terry
model to accommodate ties", JASA 65 (1970), with nu > 0.

Loss of a pair, with the share q of the votes for `chosen`, a margin m, label smoothing e and q' = q + e (1 - 2 q):

    -(q' log P(chosen; d - m) + (1 - q') log P(rejected; d - m)),  least at d = m + logit(q') without ties

For q = 1, e = 0 it is TRL's RewardTrainer, -log sigma(d - m); e is the smoothing of cDPO (Mitchell 2023,
`label_smoothing` of TRL's DPOConfig). A pair with q = 0.5 exactly is a tie: with a model of ties its loss is
-log P(tie; d - m), without one the sum above, which pulls the two scores together.
`center_rewards_coefficient` c adds c (r(chosen) + r(rejected))^2 (Eisenstein et al., arXiv 2312.09244, Eq. 2; TRL).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.metrics import Metrics

TIE_MODELS = ("none", "rao_kupper", "davidson")

TIE = 0.5
"""The soft label of a tie."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Options of `preference_loss`."""

    tie_model: str = "none"
    """How ties (soft label 0.5) are explained; see the module."""
    label_smoothing: float = 0.0
    """Share of the answers that are taken to be slips, in [0, 0.5)."""
    margin_scale: float = 1.0
    """Margins are multiplied by it: from the data set's unit to that of the score. 0: margins are not used."""
    center_rewards_coefficient: float | None = None
    """Weight of the squared sum of the two scores; TRL recommends 0.01. None: scores have no fixed centre."""

    def __post_init__(self) -> None:
        if self.tie_model not in TIE_MODELS:
            raise ValueError(f"tie_model: expected one of {list(TIE_MODELS)}, got {self.tie_model!r}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: expected a share in [0, 0.5), got {self.label_smoothing!r}")
        if not (math.isfinite(self.margin_scale) and self.margin_scale >= 0):
            raise ValueError(f"margin_scale: expected a number of at least 0, got {self.margin_scale!r}")
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and not (math.isfinite(coefficient) and coefficient >= 0):
            raise ValueError(
                f"center_rewards_coefficient: expected a number of at least 0 or None, got {coefficient!r}"
            )


def rao_kupper_log_probs(
    difference: Float[Tensor, "*b"], eta: Float[Tensor, "*#b"]
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """log P of chosen, rejected and tie; eta = log(theta) > 0, the difference that two clips need to be told apart."""
    chosen, rejected = F.logsigmoid(difference - eta), F.logsigmoid(-difference - eta)
    return chosen, rejected, torch.expm1(2 * eta).log() + chosen + rejected


def davidson_log_probs(
    difference: Float[Tensor, "*b"], log_nu: Float[Tensor, "*#b"]
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """log P of chosen, rejected and tie; P(tie) = nu / (2 + nu) between clips of equal worth."""
    terms = torch.stack([difference / 2, -difference / 2, log_nu.expand_as(difference)])
    chosen, rejected, tie = terms.log_softmax(0)
    return chosen, rejected, tie


def tie_threshold(raw: Float[Tensor, "*b"], tie_model: str) -> Float[Tensor, "*b"]:
    """The threshold of a model of ties from an unbounded parameter: eta = softplus(raw) > 0, or log nu = raw."""
    return F.softplus(raw) if tie_model == "rao_kupper" else raw


def preference_nll(
    difference: Float[Tensor, "*b"],
    soft_labels: Float[Tensor, "*#b"],
    config: LossConfig | None = None,
    threshold: Float[Tensor, "*#b"] | None = None,
) -> Float[Tensor, "*b"]:
    """Loss of each pair, in nats, of d - m; see the module. `threshold`: eta or log nu, of a model of ties."""
    config = config or LossConfig()
    smoothed = soft_labels + config.label_smoothing * (1 - 2 * soft_labels)
    if config.tie_model == "none":
        return -(smoothed * F.logsigmoid(difference) + (1 - smoothed) * F.logsigmoid(-difference))
    assert threshold is not None, f"{config.tie_model} has a threshold"
    log_probs = rao_kupper_log_probs if config.tie_model == "rao_kupper" else davidson_log_probs
    chosen, rejected, tie = log_probs(difference, threshold)
    decided = -(smoothed * chosen + (1 - smoothed) * rejected)
    return torch.where(soft_labels == TIE, -tie, decided)


def preference_loss(
    chosen: Float[Tensor, "b members"],
    rejected: Float[Tensor, "b members"],
    *,
    soft_labels: Float[Tensor, " b"],
    margins: Float[Tensor, " b"],
    weights: Float[Tensor, " b"],
    counts: Float[Tensor, "b members"] | None = None,
    config: LossConfig | None = None,
    threshold: Float[Tensor, " members"] | None = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Weighted mean of the pairs' losses, sum w loss / sum w, mean over members; TRL's metrics of their mean score.

    `counts`: how often each member's bootstrap sample holds each pair, 1 on average (`bootstrap_counts`); None: once.
    Members share no parameter of their scores, so that each learns as if it were alone.
    """
    config = config or LossConfig()
    difference = chosen - rejected - config.margin_scale * margins[:, None]
    losses = preference_nll(difference, soft_labels[:, None], config, threshold)
    if config.center_rewards_coefficient is not None:
        losses = losses + config.center_rewards_coefficient * (chosen + rejected).square()
    shares = (weights / weights.sum())[:, None]
    loss = (shares * (losses if counts is None else counts * losses)).sum(0).mean()
    return loss, reward_metrics(chosen.mean(1), rejected.mean(1), soft_labels)


def bootstrap_counts(pairs: int, members: int, generator: torch.Generator) -> Float[Tensor, "pairs members"]:
    """How often each member sees each pair: Poisson(1), the bootstrap of large samples (Oza & Russell, 2001).

    One member sees every pair once.
    """
    ones = torch.ones(pairs, members)
    return ones if members == 1 else torch.poisson(ones, generator=generator)


def reward_metrics(
    chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"], soft_labels: Float[Tensor, " b"]
) -> Metrics:
    """`accuracy` and `margin` [b], `min_reward`, `mean_reward`, `max_reward` (TRL's RewardTrainer), without gradient.

    `accuracy` is whether chosen scores higher than rejected; NaN for ties (TRL has none), which are no one's to win.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    scores = torch.cat([chosen, rejected])
    right = (chosen > rejected).to(scores.dtype)
    return {
        "accuracy": right.masked_fill(soft_labels == TIE, math.nan),
        "margin": chosen - rejected,
        "min_reward": scores.min(),
        "mean_reward": scores.mean(),
        "max_reward": scores.max(),
    }
