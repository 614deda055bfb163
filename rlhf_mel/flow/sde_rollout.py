"""SDE rollouts: samples of a policy some of whose steps are random, and how probable each of those steps is.

    rollout:  x' ~ N(mean_old, std^2) in the window, ODE elsewhere, log p_old(x' | x) kept
    replay:   mean_theta(x) again, with gradients, at the states that were visited

Noise enters only the frames that are the policy's work, and only they count in log-probabilities and divergences:
never those of the reference clip, which follow the ODE. Each item is what it would be alone, though many are solved
together (see policy.rows_together). Log-probabilities are float32 at least, whatever the
autocast around them. In a replay each velocity is checkpointed, even one alone: memory does not grow with the window,
and the first run of each is by the kernels of the rollout.

The SDEs, the densities and their references: see sde.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_mel.flow.noise import Generators, branched, item_generators, item_noise, of_rows
from rlhf_mel.flow.policy import Policy, collect_rollout, evaluating, rows_together, velocity_as_now, with_durations
from rlhf_mel.flow.recompute import PureVelocity, Velocity, differentiated
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.flow.sde import SDE, Transition, mean_log_prob, solve_sde
from rlhf_mel.types import Prompts, Rollout


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The random steps of b prompts: w steps in the window, n frames, reference and padding included."""

    rows: Sequence[int]
    """Places of the b prompts in their batch."""
    prompts: Prompts
    cfg_strength: float
    dtype: torch.dtype
    """That of the policy's noise, in which its velocity is computed."""
    sde: SDE
    t: Float[Tensor, " times"]
    """The grid."""
    window: range
    """The w steps of the grid that were random."""
    states: Float[Tensor, "states b n m"]
    """Before the window, after its first step, ..."""
    means: Float[Tensor, "w b n m"]
    """Of what each step was drawn from."""
    mean_log_probs: Float[Tensor, "w b"]
    """Of each step, see sde.mean_log_prob."""


@torch.no_grad()
def sde_rollout(
    policy: Policy,
    prompts: Prompts,
    *,
    sde: SDE,
    window: range,
    steps: int = 16,
    cfg_strength: float = 2.0,
    sway_sampling_coef: float | None = -1.0,
    method: str = "euler",
    generator: Generators = None,
    shared_prior: bool = False,
) -> tuple[Rollout, list[Trajectory]]:
    """Sample from the policy with noise in the steps of `window`; a trajectory for what was solved together.

    Noise x_0 is that of policy.rollout for the same generator.

    Args:
        shared_prior: rollouts of one group begin at the same x_0, so that they differ by the window's noise only.
    """
    priors = item_generators(generator, len(prompts))
    prompts = with_durations(policy, prompts, priors)
    kicks = None if priors is None else [branched(prior, 1)[0] for prior in priors]
    if shared_prior and priors is not None and prompts.group_ids is not None:
        ids = prompts.group_ids.tolist()
        priors = [priors[ids.index(group)].clone_state() for group in ids]
    mels: dict[int, Tensor] = {}
    trajectories = []
    with evaluating(policy):
        t = policy.timesteps(steps, sway_sampling_coef=sway_sampling_coef)
        for rows in rows_together(policy, prompts, method):
            grouped = prompts.select(rows)
            cond = policy.encode(grouped, cfg_strength=cfg_strength)
            x0 = policy.prior(cond, of_rows(priors, rows))
            assert grouped.durations_frames is not None
            noise = partial(_noise_like, x0, grouped.durations_frames.tolist(), of_rows(kicks, rows))
            velocity, moved = _velocity(policy, cond, x0.dtype), cond.generated
            states, transitions = solve_sde(velocity, x0, t, sde, noise, window=window, moved=moved, method=method)
            mel = policy.finalize(states[-1].to(x0.dtype), cond)
            mels |= {row: mel[item, moved[item]] for item, row in enumerate(rows)}
            visited = states[window.start : window.stop + 1]
            drawn = zip(visited[1:], transitions, strict=True)
            trajectories.append(
                Trajectory(
                    rows=rows,
                    prompts=grouped,
                    cfg_strength=cfg_strength,
                    dtype=x0.dtype,
                    sde=sde,
                    t=t,
                    window=window,
                    states=torch.stack(visited),
                    means=torch.stack([transition.mean for transition in transitions]),
                    mean_log_probs=torch.stack([mean_log_prob(x, transition, moved) for x, transition in drawn]),
                )
            )
    return collect_rollout(mels), trajectories


def replay(policy: Policy | ReferencePolicy, trajectory: Trajectory) -> tuple[list[Transition], Bool[Tensor, "b n"]]:
    """What `policy` (or the reference) would have drawn each step of the window from, and the frames that count.

    With gradients where they are enabled and the policy has them.
    """
    with evaluating(policy):
        cond = policy.encode(trajectory.prompts, cfg_strength=trajectory.cfg_strength)
        velocity = differentiated(_velocity(policy, cond, trajectory.dtype), checkpoint=True)
        transitions = [
            trajectory.sde.transition(x, velocity(x, trajectory.t[step]), trajectory.t, step, cond.generated)
            for step, x in zip(trajectory.window, trajectory.states[:-1], strict=True)
        ]
    return transitions, cond.generated


def _velocity(policy: Policy | ReferencePolicy, cond: Any, dtype: torch.dtype) -> Velocity:
    """The policy's velocity in the dtype of x, computed in `dtype`, that of the policy's own noise."""
    velocity = velocity_as_now(policy, cond)
    if not isinstance(velocity, PureVelocity):
        return lambda x, t: velocity(x.to(dtype), t).to(x.dtype)
    return replace(velocity, function=lambda x, t, cond: velocity.function(x.to(dtype), t, cond).to(x.dtype))


def _noise_like(x0: Tensor, lengths_frames: Sequence[int], generators: Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal [b, T, M], at least float32, each item from its own generator, zero beyond its length."""
    dtype = torch.promote_types(x0.dtype, torch.float32)
    return item_noise(lengths_frames, x0.shape[2], generators, x0.device, dtype)
