"""The loss of the score-function family: PPO's clipped surrogate on the random steps of a rollout, and its anchor.

    ratio_k = exp(log p_theta(x_{k+1} | x_k) - log p_old(x_{k+1} | x_k))          at the states that were visited
    loss = mean_items mean_k [ max(-A ratio_k, -A clip(ratio_k, 1 - eps_low, 1 + eps_high)) + beta KL_k ]

p is Gaussian, so the divergence to the reference policy has a closed form, KL_k = (mean - mean_ref)^2 / (2 std^2).
Both log p and KL are means over the elements of an item (see sde.mean_log_prob). Where nothing is clipped, the
gradient is that of E[A] - beta E[sum_k KL_k], the KL-regularised objective, divided by elements and steps: with
advantages that are rewards less a baseline, its optimum is the reference's path distribution tilted by exp(r / beta).

GRPO-Guard (Wang et al. 2025, arXiv 2510.22319) replaces the log-ratio, whose mean is -|dm|^2 / (2 std^2) < 0 with
dm = mean_theta - mean_old and whose spread differs from step to step, by

    std (log ratio + |dm|^2 / (2 std^2)) = dm (x_{k+1} - mean_old) / std         (mean 0, spread |dm|)

so that clipping treats better and worse rollouts alike, and divides the loss of a step by its dt, so that all steps
have gradients of one size (in this form as verl-omni's GRPOGuardLoss). The KL is not weighed anew.

References: Schulman et al. 2017, PPO, arXiv 1707.06347; Black et al. 2023, DDPO, arXiv 2305.13301; Liu et al. 2025,
Flow-GRPO, arXiv 2505.05470. flow_grpo leaves dt out of the std of its KL; here it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from rlhf_mel.algorithms.base import AlgorithmBase, Clip
from rlhf_mel.flow.ode import STEPWISE_METHODS
from rlhf_mel.flow.policy import Policy
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.flow.sde import SDE, Transition, mean_log_prob, transition_kl
from rlhf_mel.flow.sde_rollout import Trajectory, replay
from rlhf_mel.masked import counted_mean
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class ScoredTrajectories:
    """B rollouts with random steps that several updates learn from, and what they are worth."""

    trajectories: Sequence[Trajectory]
    advantages: Float[Tensor, " b"]
    dropped: Bool[Tensor, " b"]
    """Rollouts without a reward; they count in the anchor only."""
    metrics: Mapping[str, Tensor]
    """What to log of them, with every update that they are used for."""


def check_clipping(name: str, low: float, high: float | None, advantage_clip: float) -> None:
    """Raise a ValueError unless all are positive numbers; `name` is the algorithm's."""
    for option, value in (("epsilon", low), ("epsilon_high", high), ("advantage_clip", advantage_clip)):
        if value is None and option == "epsilon_high":
            continue
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{option} of {name}: expected a number above 0, got {value!r}")


def clipped_surrogate(
    ratio: Float[Tensor, "*steps b"], advantages: Float[Tensor, " b"], clip: Clip
) -> Float[Tensor, "*steps b"]:
    """max(-A ratio, -A clip(ratio)), elementwise; A is the same in all steps of a rollout."""
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def clipped_shares(
    ratio: Float[Tensor, "steps b"], advantages: Float[Tensor, " b"], clip: Clip
) -> dict[str, Float[Tensor, " b"]]:
    """TRL's clip_ratio metrics: of each item, the share of steps whose gradient the bounds cut off."""
    low = (ratio < 1 - clip.low) & (advantages < 0)
    high = (ratio > 1 + clip.high) & (advantages > 0)
    shares = {"low_mean": low, "high_mean": high, "region_mean": low | high}
    return {f"clip_ratio/{name}": cut.float().mean(0) for name, cut in shares.items()}


def guard_log_ratio(
    x: Float[Tensor, "b n m"],
    transition: Transition,
    mean_old: Float[Tensor, "b n m"],
    counted: Bool[Tensor, "b n"],
) -> Float[Tensor, " b"]:
    """GRPO-Guard's log-ratio of the step to x: mean of (mean - mean_old) (x - mean_old) / std."""
    return counted_mean((transition.mean - mean_old) * (x - mean_old) / transition.std, counted)


def policy_gradient_loss(
    policy: Policy,
    reference: ReferencePolicy | None,
    collected: ScoredTrajectories,
    *,
    clip: Clip,
    beta: float,
) -> tuple[Float[Tensor, ""], Mapping[str, Float[Tensor, " b"]]]:
    """The loss of B rollouts, and of each `clip_ratio/*`, `kl` and `ratio_error`, the largest |ratio - 1| of its steps.

    `reference` is None where beta is 0.
    """
    advantages, trajectories = collected.advantages, collected.trajectories
    batch = len(advantages)
    kept = (~collected.dropped).float() / (~collected.dropped).sum().clamp(min=1)
    loss = advantages.new_zeros(())
    metrics: dict[str, Tensor] = {}
    for trajectory in trajectories:
        rows = torch.tensor(trajectory.rows, device=advantages.device)
        transitions, counted = replay(policy, trajectory)
        ratio = ratios(trajectory, transitions, counted, clip)
        surrogate = (_step_weights(trajectory, clip) * clipped_surrogate(ratio, advantages[rows], clip)).mean(0)
        loss = loss + (kept[rows] * surrogate).sum()
        logged = clipped_shares(ratio.detach(), advantages[rows], clip) | {
            "ratio_error": (ratio.detach() - 1).abs().amax(0)
        }
        if reference is not None:
            kl = _kls(reference, trajectory, transitions, counted).mean(0)
            loss = loss + beta * kl.sum() / batch
            logged["kl"] = kl.detach()
        for name, values in logged.items():
            metrics.setdefault(name, values.new_zeros(batch))[rows] = values
    return loss, metrics


def ratios(
    trajectory: Trajectory, transitions: Sequence[Transition], counted: Bool[Tensor, "b n"], clip: Clip
) -> Float[Tensor, "steps b"]:
    """Ratio of probabilities of each step: 1 where the policy is the one that rolled out."""
    reached = trajectory.states[1:]
    if clip.guard:
        visited = zip(reached, transitions, trajectory.means, strict=True)
        return torch.stack([guard_log_ratio(x, step, mean_old, counted) for x, step, mean_old in visited]).exp()
    log_probs = [mean_log_prob(x, step, counted) for x, step in zip(reached, transitions, strict=True)]
    return (torch.stack(log_probs) - trajectory.mean_log_probs).exp()


def _step_weights(trajectory: Trajectory, clip: Clip) -> Tensor:
    """[W, 1]: GRPO-Guard's 1 / dt, else 1."""
    dt = trajectory.t.diff()[trajectory.window.start : trajectory.window.stop].float()
    return (1 / dt if clip.guard else torch.ones_like(dt)).unsqueeze(1)


def _kls(
    reference: ReferencePolicy, trajectory: Trajectory, transitions: Sequence[Transition], counted: Tensor
) -> Tensor:
    """[W, b]: divergence of each step from the reference's."""
    with torch.no_grad():
        references, _ = replay(reference, trajectory)
    pairs = zip(transitions, references, strict=True)
    return torch.stack([transition_kl(step, at_reference.mean, counted) for step, at_reference in pairs])


def check_sde_window(name: str, pipeline: Pipeline, sde: SDE, window: range) -> None:
    """Raise unless the steps of `window`, those that may be random, are in the grid and have noise."""
    steps, method = pipeline.sampling.steps, pipeline.sampling.method
    if sde.noise_level == 0:
        raise ValueError(f"noise_level of {name}: expected above 0, got 0: without noise a step has no probability")
    random = sde.random_steps(steps)
    if not 0 <= window.start < window.stop <= random.stop:
        raise ValueError(
            f"algorithm {name!r} trains steps [{window.start}, {window.stop}): expected some of [0, {random.stop}), "
            f"those of the {steps} sampling_steps that have noise by {sde.kind!r}; change window_range or "
            "sampling_steps"
        )
    if method not in STEPWISE_METHODS:
        raise ValueError(
            f"algorithm {name!r} takes single steps: expected --solver of {STEPWISE_METHODS}, got {method!r}"
        )


class PolicyGradientAlgorithm(AlgorithmBase):
    """PPO on random steps: the Config has `sde` and `noise_level` of their noise, `epsilon` and `epsilon_high`.

    A subclass collects `ScoredTrajectories`, and says in which steps and by which advantages.
    """

    @property
    @override
    def clip(self) -> Clip:
        return Clip.of(self.config.epsilon, self.config.epsilon_high)

    @property
    @override
    def step_noise(self) -> SDE:
        return SDE(kind=self.config.sde, noise_level=self.config.noise_level)

    @override
    def loss(
        self, pipeline: Pipeline, collected: ScoredTrajectories, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Metrics]:
        policy, reference = pipeline.policy, pipeline.reference
        loss, metrics = policy_gradient_loss(policy, reference, collected, clip=self.clip, beta=self.beta)
        return loss, {**collected.metrics, **metrics}

    @override
    def trajectories(self, collected: ScoredTrajectories) -> Sequence[Trajectory]:
        return collected.trajectories
