"""From prompts to scores: rollouts of the policy, their sound, and what the reward models say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint as recompute
from typing_extensions import override

from rlhf_mel.flow.noise import Generators
from rlhf_mel.flow.policy import ExtendedCondition, ExtendingWrapper, Policy, PolicyWrapper, pure_velocity, rollout
from rlhf_mel.flow.recompute import PureVelocity, Rerun, Velocity, Weights, pull_back
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.flow.sde import SDE
from rlhf_mel.flow.sde_rollout import Trajectory, sde_rollout
from rlhf_mel.masked import frame_mean, lengths_to_mask
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.audio import frames_to_samples
from rlhf_mel.types import Audio, Prompts, Rollout, Scores
from rlhf_mel.vocoders import Vocoder


def vocode(vocoder: Vocoder, rollout: Rollout) -> Audio:
    """The rollout's waveform with its mel; gradients flow where the vocoder has them.

    An item of T frames has (T - 1) * hop samples (mel kind `vocos`, see audio.frames_to_samples), zero beyond them.

    Raises:
        ValueError: the vocoder's waveform is too short for the mel.
    """
    waveform = vocoder(rollout.mel, rollout.lengths_frames)
    lengths_samples = frames_to_samples(rollout.lengths_frames, vocoder.mel_spec)
    needed = int(lengths_samples.max())
    if waveform.shape[:1] != rollout.mel.shape[:1] or waveform.shape[1] < needed:
        raise ValueError(
            f"{type(vocoder).__name__}: expected a waveform [{len(rollout.mel)}, {needed} samples] for "
            f"{rollout.mel.shape[1]} frames, got {tuple(waveform.shape)}"
        )
    waveform = waveform[:, :needed]
    return Audio(
        waveform=waveform.where(lengths_to_mask(lengths_samples, needed), 0.0),
        lengths_samples=lengths_samples,
        sample_rate_hz=vocoder.sample_rate_hz,
        mel=rollout.mel,
        lengths_frames=rollout.lengths_frames,
    )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the policy is solved; the fields of `policy.rollout`."""

    steps: int = 16
    cfg_strength: float = 2.0
    sway_sampling_coef: float | None = -1.0
    method: str = "euler"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """From prompts to scores: the policy that is trained, and all that is frozen around it."""

    policy: Policy
    vocoder: Vocoder
    rewards: Rewards
    reference: ReferencePolicy | None
    """The policy before training; None where nothing is anchored to it (beta = 0)."""
    sampling: Sampling = Sampling()
    reward_batch_size: int | None = None
    """Rollouts that vocoder and rewards hear at once; None: all."""
    recompute: bool = True
    """Whether velocities of several steps run again in backward(), or keep their activations."""

    def rollout(
        self,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        grad_steps: int,
        jump_from: int | None = None,
    ) -> tuple[Rollout, Float[Tensor, " b"]]:
        """Rollout whose last `grad_steps` steps carry gradients, and its anchor over those steps (see AnchoredPolicy).

        Args:
            jump_from: solve up to this step of the grid, then take one straight step to the end of the flow, to
                x + (1 - t) v(x, t); None: solve to the end.
        """
        view = self.policy if jump_from is None else JumpingPolicy(self.policy, jump_from)
        view = view if self.reference is None else AnchoredPolicy(view, self.reference)
        rollouts = rollout(
            view,
            prompts,
            generator=generator,
            grad_steps=grad_steps,
            checkpoint=self.recompute
            and grad_steps > 1,  # one step's graph is all that is ever held, kept or recomputed
            **dataclasses.asdict(self.sampling),
        )
        _check_finite(rollouts.mel)
        if self.reference is None:
            return rollouts, rollouts.mel.new_zeros(len(prompts))
        mel, rate = rollouts.mel[..., :-1], rollouts.mel[..., -1]
        times = view.timesteps(self.sampling.steps, sway_sampling_coef=self.sampling.sway_sampling_coef)
        duration = times[-1] - times[-1 - grad_steps]
        return dataclasses.replace(rollouts, mel=mel), frame_mean(rate, rollouts.lengths_frames) / duration

    def sample(self, prompts: Prompts, generator: torch.Generator) -> Rollout:
        """Rollout without gradients."""
        rollouts = rollout(self.policy, prompts, generator=generator, grad_steps=0, **dataclasses.asdict(self.sampling))
        _check_finite(rollouts.mel)
        return rollouts

    def sde_rollout(
        self, prompts: Prompts, generator: torch.Generator, *, sde: SDE, window: range, shared_prior: bool = False
    ) -> tuple[Rollout, list[Trajectory]]:
        """Rollout without gradients whose steps in `window` are random, and the probabilities of those steps."""
        rollouts, trajectories = sde_rollout(
            self.policy,
            prompts,
            sde=sde,
            window=window,
            shared_prior=shared_prior,
            generator=generator,
            **dataclasses.asdict(self.sampling),
        )
        _check_finite(rollouts.mel)
        return rollouts, trajectories

    def score(self, rollouts: Rollout, prompts: Prompts) -> Scores:
        """What the rewards say of a rollout, in float32 whatever the autocast around it.

        In parts of `reward_batch_size`, of which backward() holds the graph of one at a time and computes it again.
        """
        with torch.autocast(rollouts.mel.device.type, enabled=False):
            rollouts = dataclasses.replace(rollouts, mel=rollouts.mel.float())
            parts = torch.split(torch.arange(len(prompts)), self.reward_batch_size or len(prompts))
            if len(parts) == 1:
                return self.rewards(vocode(self.vocoder, rollouts), prompts)
            scores = [self._score_part(rollouts, prompts, rows.tolist()) for rows in parts]
        breakdown = {name: torch.cat([score.breakdown[name] for score in scores]) for name in self.rewards.names}
        return Scores(total=torch.cat([score.total for score in scores]), breakdown=breakdown)

    def _score_part(self, rollouts: Rollout, prompts: Prompts, rows: list[int]) -> Scores:
        lengths = rollouts.lengths_frames[rows]
        chosen = prompts.select(rows)

        def score(mel: Tensor) -> Scores:
            return self.rewards(vocode(self.vocoder, Rollout(mel=mel, lengths_frames=lengths)), chosen)

        mel = rollouts.mel[rows, : int(lengths.max())]
        return recompute(score, mel, use_reentrant=False) if mel.requires_grad else score(mel)


def _check_finite(mel: Tensor) -> None:
    if not bool(torch.isfinite(mel).all()):
        raise FloatingPointError(
            "the policy generated a mel that is not finite: expected numbers, got NaN or infinity; lower "
            "learning_rate or raise beta, and start again from the last checkpoint"
        )


def require_reward_gradient(name: str, pipeline: Pipeline) -> None:
    """Raise if the vocoder or a reward has no gradient; `name` is the algorithm's."""
    weighted = zip(pipeline.rewards.models, pipeline.rewards.weights, strict=True)
    parts = {f"reward {model.name!r}": model.differentiable for model, weight in weighted if weight != 0}
    parts["the vocoder"] = pipeline.vocoder.differentiable
    lacking = [part for part, differentiable in parts.items() if not differentiable]
    if lacking:
        raise ValueError(
            f"algorithm {name!r} follows the gradient of the reward through the waveform: expected every part to be "
            f"differentiable, got {' and '.join(lacking)} without a gradient; choose another, or an algorithm that "
            "needs none"
        )


class JumpingPolicy(PolicyWrapper):
    """The policy on a grid that jumps from step `jump_from` to the end of the flow."""

    def __init__(self, policy: Policy, jump_from: int) -> None:
        super().__init__(policy)
        self.jump_from = jump_from

    @override
    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Float[Tensor, " times"]:
        times = super().timesteps(steps, sway_sampling_coef=sway_sampling_coef)
        return torch.cat([times[: self.jump_from + 1], times[-1:]])


class AnchoredPolicy(ExtendingWrapper):
    """The policy with the anchor as one more channel of its state; what it needs besides is the reference's condition.

    The channel is da/dt = mean_M |v - v_ref|^2, a(0) = 0, where gradients flow, and 0 elsewhere: the solver
    integrates it with the mel, under its truncation, checkpoints and grouping (as the kinetic energy of Finlay et
    al. 2020, arXiv 2002.02798). The reference is differentiated by the state where the state has a gradient.
    """

    def __init__(self, policy: Policy, reference: ReferencePolicy) -> None:
        super().__init__(policy)
        self.reference = reference

    @override
    def extra(self, prompts: Prompts, *, cfg_strength: float) -> Any:
        return self.reference.encode(prompts, cfg_strength=cfg_strength)

    @override
    def prior(self, cond: ExtendedCondition, generator: Generators = None) -> Float[Tensor, "b n channels"]:
        return F.pad(super().prior(cond, generator), (0, 1))

    @override
    def velocity(
        self, x: Float[Tensor, "b n channels"], t: Float[Tensor, " ..."], cond: ExtendedCondition
    ) -> Float[Tensor, "b n channels"]:
        mel = x[..., :-1]
        v = self.policy.velocity(mel, t, cond.policy)
        v_ref = self.reference.velocity(mel, t, cond.extra)
        return torch.cat([v, (v - v_ref).square().mean(-1, keepdim=True)], dim=-1)

    @override
    def velocity_without_gradient(
        self, x: Float[Tensor, "b n channels"], t: Float[Tensor, " ..."], cond: ExtendedCondition
    ) -> Float[Tensor, "b n channels"]:
        """In the steps that are not trained the anchor stands still."""
        return F.pad(self.policy.velocity(x[..., :-1], t, cond.policy), (0, 1))

    @override
    def velocity_as_now(self, cond: ExtendedCondition) -> Velocity:
        own, plain = super().velocity_as_now(cond), pure_velocity(self, cond)
        if not (isinstance(own, PureVelocity) and own.fast):
            return plain  # differentiated by autograd, the policy runs once less
        return replace(plain, differentiate=partial(self._differentiate, own))

    def _differentiate(
        self, own: PureVelocity, run: Rerun, leaves: Sequence[Any], weights: Weights, cotangent: Tensor
    ) -> list[Tensor | None]:
        """With g the cotangent of v and h that of the anchor's rate, the product is that of v with g + p, and of v_ref

        with -p, where p = 2 h (v - v_ref) / M; leaves are those of (x, t, cond).
        """
        x, t, cond = tree_unflatten(leaves, run.structure)
        inside: Any = super().velocity_as_now(cond)
        own = replace(own, cond=inside.cond)  # the leaves; all else is as it was in the solve
        mel = x[..., :-1].detach().requires_grad_(x.requires_grad)
        with run.autocast(), torch.no_grad():
            v = own.function(mel, t, own.cond)
        with run.autocast(), torch.set_grad_enabled(x.requires_grad):
            v_ref = self.reference.velocity(mel, t, cond.extra)
        push = 2 * cotangent[..., -1:] * (v - v_ref.detach()).to(x.dtype) / mel.shape[-1]
        found = pull_back(own, (mel, t, own.cond), run.autocast, weights, cotangent[..., :-1] + push)
        known = [leaf for leaf in tree_leaves((mel, t, own.cond)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        of = dict(zip(map(id, known), found, strict=True))
        if x.requires_grad:
            (of_reference,) = torch.autograd.grad(v_ref, mel, -push.to(v_ref.dtype))
            own_share = of[id(mel)]
            of[id(x)] = F.pad(of_reference if own_share is None else own_share + of_reference, (0, 1))
        return [of.get(id(leaf)) for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    @override
    def finalize(self, x1: Float[Tensor, "b n channels"], cond: ExtendedCondition) -> Float[Tensor, "b n channels"]:
        return torch.cat([super().finalize(x1[..., :-1], cond), x1[..., -1:]], dim=-1)


def require_gradient(sampler: str, vocoder: Vocoder, rewards: Rewards) -> None:
    """Raise unless the score has a gradient with respect to the mel."""
    if not rewards.differentiable or not vocoder.differentiable:
        lacking = [model.name for model in rewards.models if not model.differentiable]
        raise ValueError(
            f"{sampler} follows the gradient of the reward through the waveform: expected a vocoder and rewards with "
            f"one, got {'no gradient of the vocoder' if not vocoder.differentiable else f'none of {lacking}'}; choose "
            "others, or best-of-N, which needs none"
        )
