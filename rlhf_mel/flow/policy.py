"""The policy: a flow from noise to mel, conditioned on a prompt; and what all policies share.

    cond = encode(prompts);  x_0 = prior(cond);  dx/dt = velocity(x, t, cond);  mel = finalize(x_1, cond)

A policy is anything with those methods (`Policy`). Its velocity is pure, so solvers, checkpointing,
truncation and the reference policy are written once, for all of them. Time convention: see path.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from rlhf_mel.flow.noise import Generators, item_generators, of_rows
from rlhf_mel.flow.ode import WHOLE_METHODS, GradSteps, solve
from rlhf_mel.flow.recompute import PureVelocity, Rerun, Velocity, Weights
from rlhf_mel.modules import keep_mode, modules_of, set_modes, weights_of
from rlhf_mel.types import Prompts, Rollout


@runtime_checkable
class Policy(Protocol):
    """A flow that turns noise into mel."""

    @property
    def tokenizer(self) -> Callable[[str], list[str]] | None:
        """Reads a text or raises ValueError, so that prompts are checked before a run; None: they are not."""
        return None

    @property
    def voices(self) -> Sequence[str]:
        """All voices that it can speak in, by the names in prompts; empty: it clones any."""
        return ()

    def durations(self, prompts: Prompts) -> Int[Tensor, " b"]:
        """Frames of each state: `prompts.durations_frames`, else `prompts.generated_frames` and what the policy puts
        before them (a reference that it continues), else by the policy's own rule.
        """
        ...

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Any:
        """All that the velocity needs to know of the prompts, with its graph: a pytree; once a solve.

        It has an attribute `generated`, bool [b, n]: the frames that are the policy's work.
        """
        ...

    def prior(self, cond: Any, generator: Generators = None) -> Float[Tensor, "b n m"]:
        """Noise x_0, different for each item."""
        ...

    def velocity(self, x: Float[Tensor, "b n m"], t: Float[Tensor, " ..."], cond: Any) -> Float[Tensor, "b n m"]:
        """dx/dt; pure, guidance included. t is a scalar, or [b]."""
        ...

    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Float[Tensor, " times"]:
        """The steps + 1 times from 0 to 1."""
        ...

    def finalize(self, x1: Float[Tensor, "b n m"], cond: Any) -> Float[Tensor, "b n m"]:
        """The end of the flow as log mel: reference pasted in."""
        ...


DEFAULTS: Mapping[str, Any] = {"tokenizer": None, "voices": ()}
"""What `policies.check` gives a policy that does not declare these."""


@runtime_checkable
class FastGradients(Protocol):
    """What a policy may have besides: a way to the gradient of its velocity that is sooner than autograd's."""

    @property
    def fast_gradients(self) -> bool:
        """Whether that way is open now; else `differentiate` is not called."""
        ...

    def velocity_terms(self, cond: Any) -> list[tuple[Any, float]]:
        """[(part of cond, factor)]: dx/dt is the sum of factor * velocity(x, t, part). One at a time saves memory."""
        ...

    def differentiate(
        self, run: Rerun, leaves: Sequence[Any], weights: Weights, cotangent: Float[Tensor, "b n m"]
    ) -> Sequence[Tensor | None]:
        """`recompute.differentiate` for this policy's velocity in eval mode."""
        ...


@runtime_checkable
class DrawsTiming(Protocol):
    """What a policy may have besides: a rhythm that differs from take to take."""

    @property
    def draws_timing(self) -> bool:
        """Whether the rhythm of an item, and so its duration, depends on `prompts.timing_seeds`."""
        ...


@runtime_checkable
class MixesDurations(Protocol):
    """What a policy may have besides: items of several durations in one batch, each as it would be alone."""

    @property
    def mixes_durations(self) -> bool:
        """Whether `encode` takes prompts of several total durations now; states are zero beyond each."""
        ...


class PolicyWrapper(nn.Module):
    """A policy around another one, and a Policy itself: what a subclass does not change is the other's.

    A subclass whose condition holds more than the other's says by `inner` where that is. One that changes the velocity
    says by `velocity_as_now` how its gradient still gets the other's fast way.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    @property
    def tokenizer(self) -> Callable[[str], list[str]] | None:
        """Of the policy inside."""
        return self.policy.tokenizer

    @property
    def voices(self) -> Sequence[str]:
        """Of the policy inside."""
        return self.policy.voices

    @property
    def draws_timing(self) -> bool:
        """Of the policy inside."""
        return isinstance(self.policy, DrawsTiming) and self.policy.draws_timing

    @property
    def mixes_durations(self) -> bool:
        """Of the policy inside."""
        return isinstance(self.policy, MixesDurations) and self.policy.mixes_durations

    def inner(self, cond: Any) -> Any:
        """The condition of the policy inside."""
        return cond

    def durations(self, prompts: Prompts) -> Int[Tensor, " b"]:
        """See `Policy`."""
        return self.policy.durations(prompts)

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Any:
        """See `Policy`."""
        return self.policy.encode(prompts, cfg_strength=cfg_strength)

    def prior(self, cond: Any, generator: Generators = None) -> Float[Tensor, "b n m"]:
        """See `Policy`."""
        return self.policy.prior(self.inner(cond), generator)

    def velocity(self, x: Float[Tensor, "b n m"], t: Float[Tensor, " ..."], cond: Any) -> Float[Tensor, "b n m"]:
        """See `Policy`."""
        return self.policy.velocity(x, t, self.inner(cond))

    def velocity_without_gradient(
        self, x: Float[Tensor, "b n m"], t: Float[Tensor, " ..."], cond: Any
    ) -> Float[Tensor, "b n m"]:
        """In steps of a solve that are not differentiated."""
        return self.velocity(x, t, cond)

    def velocity_as_now(self, cond: Any) -> Velocity:
        """See the function of that name."""
        return velocity_as_now(self.policy, self.inner(cond))

    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Float[Tensor, " times"]:
        """See `Policy`."""
        return self.policy.timesteps(steps, sway_sampling_coef=sway_sampling_coef)

    def finalize(self, x1: Float[Tensor, "b n m"], cond: Any) -> Float[Tensor, "b n m"]:
        """See `Policy`."""
        return self.policy.finalize(x1, self.inner(cond))


class ExtendedCondition(NamedTuple):
    """A policy's condition, and what a wrapper around the policy needs besides."""

    policy: Any
    extra: Any
    generated: Bool[Tensor, "b n"]
    """The policy's own."""


class ExtendingWrapper(PolicyWrapper):
    """A wrapper that needs more of the prompts than the policy inside; its conditions are `ExtendedCondition`."""

    def extra(self, prompts: Prompts, *, cfg_strength: float) -> Any:
        """What it needs besides: a pytree, once a solve."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method extra, got none")

    @override
    def inner(self, cond: ExtendedCondition) -> Any:
        return cond.policy

    @override
    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> ExtendedCondition:
        cond = self.policy.encode(prompts, cfg_strength=cfg_strength)
        return ExtendedCondition(cond, self.extra(prompts, cfg_strength=cfg_strength), cond.generated)


def rollout(
    policy: Policy,
    prompts: Prompts,
    *,
    steps: int = 16,
    cfg_strength: float = 2.0,
    sway_sampling_coef: float | None = -1.0,
    grad_steps: GradSteps = None,
    checkpoint: bool = True,
    generator: Generators = None,
    method: str = "euler",
    return_trajectory: bool = False,
) -> Rollout:
    """Sample from the policy: the generated mel of each prompt, with gradients unless `grad_steps=0`.

    Each item is what it would be alone, though many are solved together (see `rows_together`). Runs in eval mode
    (dropout would be noise that no one scores), backward() included, and gives the caller's mode back.

    Args:
        generator: distinct noise for each item, seeded in the order of the prompts and drawn on the generator's
            own device, so it depends on neither grouping nor the policy's device; a list gives each item its own.
        grad_steps: see ode.solve.
        checkpoint: see ode.solve.
        method: see ode.solve.
    """
    differentiable = grad_steps is None or bool(grad_steps)
    if differentiable:
        require_gradients("rollout", remedy="pass grad_steps=0 for samples without gradients")
    generators = item_generators(generator, len(prompts))
    prompts = with_durations(policy, prompts, generators)
    mels: dict[int, Tensor] = {}
    trajectories: dict[int, Tensor] = {}
    constant = policy.velocity_without_gradient if isinstance(policy, PolicyWrapper) else None
    with evaluating(policy), torch.set_grad_enabled(differentiable):
        t = policy.timesteps(steps, sway_sampling_coef=sway_sampling_coef)
        for rows in rows_together(policy, prompts, method):
            cond = policy.encode(prompts.select(rows), cfg_strength=cfg_strength)
            states = solve(
                velocity_as_now(policy, cond),
                policy.prior(cond, of_rows(generators, rows)),
                t,
                method=method,
                grad_steps=grad_steps,
                checkpoint=checkpoint,
                constant=None if constant is None else partial(constant, cond=cond),
            )
            mel = policy.finalize(states[-1], cond)
            for item, row in enumerate(rows):
                mels[row] = mel[item, cond.generated[item]]
                if return_trajectory:
                    trajectories[row] = torch.stack([state[item] for state in states])
    return collect_rollout(mels, trajectories)


def with_durations(policy: Policy, prompts: Prompts, generators: Sequence[torch.Generator] | None = None) -> Prompts:
    """The prompts with the total frames that each gets: the one place that asks.

    The policy answers by what the rows ask for, or by its own rule (speech/durations.py has those of F5-TTS).
    Where it draws the rhythm of takes, and none is there, that is drawn from `generators`, and belongs to the rollout:
    whoever goes over it again (a reference, a replay) takes these prompts.
    """
    draws = isinstance(policy, DrawsTiming) and policy.draws_timing
    if draws and prompts.timing_seeds is None and generators is not None:
        seeds = [int(torch.randint(2**62, (), generator=each, device=each.device)) for each in generators]
        prompts = replace(prompts, timing_seeds=torch.tensor(seeds, device=prompts.reference_audio.device))
    return replace(prompts, durations_frames=policy.durations(prompts))


MOST_PADDING = 0.2
"""Frames of padding that a batch of several durations may have for each frame of its items."""


def rows_together(policy: Velocities, prompts: Prompts, method: str = "euler") -> list[list[int]]:
    """Places in the batch of the prompts that are solved together: of one total duration, or of several alike.

    Several, if the policy can (`MixesDurations`), within MOST_PADDING. Adaptive solvers choose one step for the whole
    batch, so theirs are of one duration.
    """
    groups = rows_by_duration(prompts)
    if not (isinstance(policy, MixesDurations) and policy.mixes_durations) or method in WHOLE_METHODS:
        return groups
    assert prompts.durations_frames is not None
    frames = prompts.durations_frames.tolist()
    together: list[list[int]] = []
    for rows in sorted(groups, key=lambda rows: -frames[rows[0]]):
        joined = [*together[-1], *rows] if together else rows
        if len(joined) * frames[joined[0]] > (1 + MOST_PADDING) * sum(frames[row] for row in joined):
            joined = rows
        elif together:
            together.pop()
        together.append(joined)
    return together


def rows_by_duration(prompts: Prompts) -> list[list[int]]:
    """Places in the batch of the prompts of each total duration."""
    assert prompts.durations_frames is not None
    rows: dict[int, list[int]] = defaultdict(list)
    for row, duration in enumerate(prompts.durations_frames.tolist()):
        rows[duration].append(row)
    return list(rows.values())


def velocity_as_now(policy: Velocities, cond: Any) -> Velocity:
    """The policy's velocity under `cond`, always in the train/eval mode it has now."""
    if isinstance(policy, PolicyWrapper):
        return policy.velocity_as_now(cond)
    if not isinstance(policy, nn.Module):
        return partial(policy.velocity, cond=cond)
    velocity = pure_velocity(policy, cond)
    if not isinstance(policy, FastGradients):
        return velocity
    if policy.fast_gradients and not policy.training:
        velocity = replace(velocity, differentiate=policy.differentiate)
    return replace(velocity, terms=policy.velocity_terms)


def pure_velocity(policy: Any, cond: Any) -> PureVelocity:
    """A module's velocity with all its weights, in the mode it has now, differentiated by autograd."""
    return PureVelocity(
        keep_mode(policy, policy.velocity),
        cond,
        lambda: [weight for weight in weights_of(policy) if weight.requires_grad],
    )


def collect_rollout(
    mels: Mapping[int, Float[Tensor, "_ m"]], trajectories: Mapping[int, Float[Tensor, "times _ m"]] | None = None
) -> Rollout:
    """Mels, and trajectories of reference and mel if any, by their place in the batch: padded and in order."""
    ordered = [mels[row] for row in range(len(mels))]
    lengths = torch.tensor([len(mel) for mel in ordered], device=ordered[0].device)
    trajectory = None
    if trajectories:
        longest = max(states.shape[1] for states in trajectories.values())
        padded = [F.pad(trajectories[row], (0, 0, 0, longest - trajectories[row].shape[1])) for row in range(len(mels))]
        trajectory = torch.stack(padded, dim=1)
    return Rollout(pad_sequence(ordered, batch_first=True), lengths, trajectory)


def require_gradients(caller: str, *, remedy: str) -> None:
    """Raise where autograd is off: a result that silently carries no gradient trains nothing."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise RuntimeError(
            f"{caller}: expected gradients to be enabled, got torch.{mode}; leave that context, or {remedy}"
        )


@contextmanager
def evaluating(policy: object) -> Iterator[None]:
    """Eval mode inside; outside, every module back in the mode it was in."""
    modules = modules_of(policy) if isinstance(policy, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        set_modes(modules, [False] * len(modules))
        yield
    finally:
        set_modes(modules, modes)


class Velocities(Protocol):
    """What has velocities: a policy, and what it is compared with, the reference or an average of weights."""

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Any:
        """See `Policy`."""
        ...

    def velocity(self, x: Float[Tensor, "b n m"], t: Float[Tensor, " ..."], cond: Any) -> Float[Tensor, "b n m"]:
        """See `Policy`."""
        ...
