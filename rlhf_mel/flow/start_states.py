"""A policy whose flow begins where it is told: at noise that was optimised, or at a sample that was made noisy again.

    prompts = begin_at(prompts, states);   rollout(Restarted(policy, times), prompts, ...)

The states travel as a column of the prompts, so each follows its prompt into whatever group it is solved in, and
gradients flow back into them. Time convention: see path.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_mel.flow.noise import Generators
from rlhf_mel.flow.policy import Policy, PolicyWrapper
from rlhf_mel.types import Prompts

STATES = "_states"
"""The column; no data set has it."""


def begin_at(prompts: Prompts, states: Sequence[Tensor]) -> Prompts:
    """`prompts` with a state [T, M] each, of all its frames, reference included."""
    if len(states) != len(prompts):
        raise ValueError(f"states: expected {len(prompts)}, one a prompt, got {len(states)}")
    return replace(prompts, columns={**prompts.columns, STATES: list(states)})


class Begun(NamedTuple):
    """A policy's condition, and the states of the same prompts."""

    policy: Any
    states: Tensor
    """Float [B, T, M]."""
    generated: Tensor
    """Bool [B, T]."""


class Restarted(PolicyWrapper):
    """The policy from `times[0]` on, at the states of `begin_at` in place of its prior; a Policy itself.

    times: the grid [K + 1] of every solve, whatever number of steps is asked for; None: the policy's own.
    """

    def __init__(self, policy: Policy, times: Tensor | None = None) -> None:
        super().__init__(policy)
        self.times = times

    def inner(self, cond: Begun) -> Any:
        return cond.policy

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> Begun:
        cond = self.policy.encode(prompts, cfg_strength=cfg_strength)
        return Begun(cond, torch.stack(list(prompts.columns[STATES])), cond.generated)

    def prior(self, cond: Begun, generator: Generators = None) -> Tensor:
        return cond.states

    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Tensor:
        if self.times is not None:
            return self.times
        return super().timesteps(steps, sway_sampling_coef=sway_sampling_coef)
