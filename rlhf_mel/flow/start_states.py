"""A policy whose flow begins where it is told: at noise that was optimised, or at a sample that was made noisy again.

    prompts = begin_at(prompts, states);   rollout(Restarted(policy, times), prompts, ...)

The states travel as a column of the prompts, so each follows its prompt into whatever group it is solved in, and
gradients flow back into them. Time convention: see path.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from rlhf_mel.flow.noise import Generators
from rlhf_mel.flow.policy import ExtendedCondition, ExtendingWrapper, Policy
from rlhf_mel.types import Prompts

STATES = "_states"
"""The column; no data set has it."""


def begin_at(prompts: Prompts, states: Sequence[Float[Tensor, "_ m"]]) -> Prompts:
    """`prompts` with a state each, of all its frames, reference included."""
    if len(states) != len(prompts):
        raise ValueError(f"states: expected {len(prompts)}, one a prompt, got {len(states)}")
    return replace(prompts, columns={**prompts.columns, STATES: list(states)})


class Restarted(ExtendingWrapper):
    """The policy from `times[0]` on, at the states of `begin_at` in place of its prior; a Policy itself.

    Args:
        times: the grid of every solve, whatever number of steps is asked for; None: the policy's own.
    """

    def __init__(self, policy: Policy, times: Float[Tensor, " times"] | None = None) -> None:
        super().__init__(policy)
        self.times = times

    @override
    def extra(self, prompts: Prompts, *, cfg_strength: float) -> Float[Tensor, "b n m"]:
        return pad_sequence(list(prompts.columns[STATES]), batch_first=True)

    @override
    def prior(self, cond: ExtendedCondition, generator: Generators = None) -> Float[Tensor, "b n m"]:
        states: Tensor = cond.extra
        return states

    @override
    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Float[Tensor, " times"]:
        if self.times is not None:
            return self.times
        return super().timesteps(steps, sway_sampling_coef=sway_sampling_coef)
