"""SDE steps with log-probabilities: the kinds of noise, their means and deviations, solves and divergences.

Every kind has the marginals of the flow (exponential, Flow-GRPO's) or its noise level (Flow-CPS); see `SDE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_mel.flow.ode import STEPS, STEPWISE_METHODS, torchdiffeq_step, without_gradient
from rlhf_mel.flow.path import noise_from_velocity, score
from rlhf_mel.flow.recompute import Velocity
from rlhf_mel.masked import counted_mean

SDE_KINDS = ("exponential", "flow_cps", "flow_sde")


class Transition(NamedTuple):
    """Where a step leads: x' ~ N(mean, std^2), all elements independent."""

    mean: Float[Tensor, "b n m"]
    std: Float[Tensor, ""]
    """Above 0 where there is noise."""


@dataclass(frozen=True, kw_only=True)
class SDE:
    """How noise enters a step; the equations are at the top."""

    kind: str = "exponential"
    noise_level: float = 0.7
    """a: 0 is Euler's step of the ODE, to the last bit. flow_grpo: 0.7; for "flow_cps" at most 1."""

    def __post_init__(self) -> None:
        if self.kind not in SDE_KINDS:
            raise ValueError(f"sde: expected one of {list(SDE_KINDS)}, got {self.kind!r}")
        most = 1.0 if self.kind == "flow_cps" else math.inf
        if not isinstance(self.noise_level, int | float) or not 0 <= self.noise_level <= most:
            raise ValueError(f"noise_level of {self.kind}: expected 0 to {most:g}, got {self.noise_level!r}")

    def transition(
        self,
        x: Float[Tensor, "b n m"],
        v: Float[Tensor, "b n m"],
        t: Float[Tensor, " times"],
        step: int,
        moved: Bool[Tensor, "b n"] | None = None,
    ) -> Transition:
        """The step from t[step] to t[step + 1], at x with velocity v, at least float32.

        Args:
            moved: frames that get noise; the others take Euler's step of the ODE. Noise in some frames only leaves the
                marginals as they are too: sigma_t may be any matrix that does not depend on x.
        """
        start, end = t[step], t[step + 1]
        ode = x + (end - start) * v
        if self.kind == "flow_sde":
            # At t = 0 sigma is infinite: flow_grpo, too, takes the time of the first step's end there.
            variance = self.noise_level**2 * (1 - start) / torch.where(start > 0, start, t[1])
            change = (end - start) * variance / 2 * score(x, v, start)
            std = (variance * (end - start)).sqrt()
        else:
            rho = self._kept_noise(start, end)
            change = -(1 - end) * (1 - rho) * noise_from_velocity(x, v, start)
            std = (1 - end) * (1 - rho.square()).sqrt()
        return Transition(ode + (change if moved is None else change.where(moved.unsqueeze(-1), 0.0)), std)

    def _kept_noise(self, start: Tensor, end: Tensor) -> Tensor:
        """rho: how much of the noise in x is still the same after the step; 1 without noise, 0 from t = 0."""
        if self.kind == "flow_cps":
            return torch.cos(math.pi / 2 * self.noise_level * torch.ones_like(start))
        return (start * (1 - end) / (end * (1 - start))) ** (self.noise_level**2 / 2)

    def random_steps(self, steps: int) -> range:
        """Those of `steps` that noise enters."""
        if self.noise_level == 0:
            return range(0)
        return range(steps if self.kind == "flow_sde" else steps - 1)


@torch.no_grad()
def solve_sde(
    velocity: Velocity,
    x0: Float[Tensor, "b n m"],
    t: Float[Tensor, " times"],
    sde: SDE,
    noise: Callable[[], Tensor],
    *,
    window: range,
    moved: Bool[Tensor, "b n"] | None = None,
    method: str = "euler",
) -> tuple[list[Float[Tensor, "b n m"]], list[Transition]]:
    """The K + 1 states from x0 on, at least float32, and what the steps of `window` were drawn from.

    Outside the window the steps are those of `solve`, by `method`.

    Args:
        noise: standard normal like x0, anew at each call; called once a step of the window.
        moved: the frames that noise is added to; None: all.
    """
    if method not in STEPWISE_METHODS:
        raise ValueError(f"ODE method beside SDE steps: expected one of {STEPWISE_METHODS}, got {method!r}")
    ode_step = STEPS.get(method) or torchdiffeq_step(method)
    function = without_gradient(velocity)
    states = [x0.to(torch.promote_types(x0.dtype, torch.float32))]
    transitions = []
    for k, (start, end) in enumerate(pairwise(t.unbind())):
        x = states[-1]
        if k not in window:
            states.append(ode_step(function, x, start, end))
            continue
        transitions.append(sde.transition(x, function(x, start), t, k, moved))
        kick = transitions[-1].std * noise()
        states.append(transitions[-1].mean + (kick if moved is None else kick.where(moved.unsqueeze(-1), 0.0)))
    return states, transitions


def mean_log_prob(
    x: Float[Tensor, "b n m"], transition: Transition, counted: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Mean of log N(x; mean, std^2) over the elements of the frames `counted`.

    A mean, as in flow_grpo, so that ratios of long and short items are alike: the log-density of an item is this
    times its number of elements, and a ratio of two such means is no ratio of likelihoods but its D-th root.
    """
    standard = (x - transition.mean) / transition.std
    return counted_mean(-standard.square() / 2 - transition.std.log() - math.log(2 * math.pi) / 2, counted)


def transition_kl(
    transition: Transition, reference: Float[Tensor, "b n m"], counted: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """KL from N(mean, std^2) to N(reference, std^2), (mean - reference)^2 / (2 std^2), as a mean likewise."""
    return counted_mean(((transition.mean - reference) / transition.std).square() / 2, counted)
