"""From noise to mel: time grids, and the solve of dx/dt = v(x, t) from t = 0 to t = 1 (see path.py).

Time grids: uniform; EPSS, a pruned grid of 32nds for few steps (Fast F5-TTS, arXiv:2505.19931); either one
then bent by sway sampling, t + s (cos(pi t / 2) - 1 + t), of F5-TTS (arXiv:2410.06885): s < 0 takes smaller
steps near noise.

Gradients: with `checkpoint` each velocity keeps only its input and runs again in backward(), so memory is
one step's graph whatever the number of steps, for 4/3 of the time. `grad_steps` truncates (DRaFT-K,
arXiv:2309.17400). Euler and midpoint are written out: they are a line or two, wait for no device, and keep no
solution buffer for autograd to copy at each step. Everything else is torchdiffeq's.

Noise: for any sigma_t the SDE  dx = (v + sigma_t^2 s / 2) dt + sigma_t dW,  with the score s of path.py, has the
marginals of the ODE, so a policy can explore without leaving its own distribution, and each step has a density. With
sigma_t = a sqrt((1 - t) / t), as Flow-GRPO, and x_1 and x_0 the two ends that v predicts, a step goes from x to

    "exponential"  x' ~ N(t' x_1 + (1 - t') rho x_0, (1 - t')^2 (1 - rho^2)), rho = (t (1 - t') / (t' (1 - t)))^(a^2/2)
    "flow_cps"     the same with rho = cos(pi a / 2)
    "flow_sde"     x' ~ N(x + dt v + (dt sigma_t^2 / 2) s, sigma_t^2 dt)

The first holds x_1 fixed over the step and solves what is then linear exactly, sigma included: the noise n of
x = t x_1 + (1 - t) n is an Ornstein-Uhlenbeck process with rho = exp(-int sigma^2 / (2 (1 - t)^2) dt). The second adds
the same share of noise in every step, however small, so it converges to no SDE. The third is Euler-Maruyama, and wrong
where dt is no less than t: near noise, in sway grids, x' has up to 1.24 times its deviation (a = 0.7) for any number
of steps (tests/flow/test_sde.py). The first two add no noise in the last step, the third leaves residual noise.

References: Liu et al. 2025, Flow-GRPO, arXiv 2505.05470; Wang & Yu 2025, Flow-CPS, arXiv 2509.05952; both as in
github.com/yifan123/flow_grpo, whose time runs the other way. Zou et al. 2026, Precise, arXiv 2605.23522, finds the same
fault and holds x_1 fixed too. The exact linear part is that of SDE-DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchdiffeq import odeint

from rlhf_mel.flow.path import State
from rlhf_mel.flow.recompute import Velocity, differentiated

GradSteps = int | Collection[int] | None
"""Steps whose velocity is differentiated: None all, K the last K, or a set of step indices."""


EPSS_GRID_32NDS: Mapping[int, tuple[int, ...]] = {
    5: (0, 2, 4, 8, 16, 32),
    6: (0, 2, 4, 6, 8, 16, 32),
    7: (0, 2, 4, 6, 8, 16, 24, 32),
    10: (0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32),
    12: (0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32),
    16: (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32),
}


STEPWISE_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4")
"""One step a grid interval, no memory of the step before: `grad_steps` has a meaning for these."""


WHOLE_METHODS = (
    "dopri5",
    "dopri8",
    "bosh3",
    "fehlberg2",
    "adaptive_heun",
    "explicit_adams",
    "implicit_adams",
)
"""torchdiffeq's adaptive and multistep methods, solved in one call."""


def timesteps(
    steps: int,
    *,
    sway_sampling_coef: float | None = None,
    use_epss: bool = True,
    t_start: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " times"]:
    """The steps + 1 increasing times from t_start to 1, at least float32: half precision merges the first."""
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    dtype = torch.promote_types(dtype, torch.float32)
    if use_epss and t_start == 0 and steps in EPSS_GRID_32NDS:
        t = torch.tensor(EPSS_GRID_32NDS[steps], device=device, dtype=dtype) / 32
    else:
        t = torch.linspace(t_start, 1, steps + 1, device=device, dtype=dtype)
    if sway_sampling_coef is not None:
        t = t + sway_sampling_coef * (torch.cos(math.pi / 2 * t) - 1 + t)
    return t


def solve(
    velocity: Velocity,
    x0: State,
    t: Float[Tensor, " times"],
    *,
    method: str = "euler",
    grad_steps: GradSteps = None,
    checkpoint: bool = True,
    constant: Velocity | None = None,
    preserve_rng_state: bool = False,
    odeint_kwargs: Mapping[str, Any] | None = None,
) -> list[State]:
    """The K + 1 states of dx/dt = velocity(x, t) at the K + 1 times t, beginning with x0.

    A list, because stacking costs the gradient of the last state a copy of them all.

    Args:
        grad_steps: None differentiates all K steps; an integer the last ones, the state before them detached; a
            set of indices those steps, in the others the velocity counts as a constant (dx'/dx = 1).
        checkpoint: keep only the input of each velocity, run it again in backward(). Same gradient.
        constant: the velocity in steps that are not differentiated; None: `velocity` itself.
        preserve_rng_state: replay the random numbers of the first run (needed if dropout is on).
        odeint_kwargs: for torchdiffeq (`rtol`, `atol`, `options`).
    """
    steps = len(t) - 1
    chosen = _chosen_steps(grad_steps, steps)
    if method not in STEPWISE_METHODS + WHOLE_METHODS:
        raise ValueError(f"ODE method: expected one of {STEPWISE_METHODS + WHOLE_METHODS}, got {method!r}")
    with_gradient = differentiated(velocity, checkpoint, preserve_rng_state)
    without = without_gradient(constant or velocity)
    odeint_kwargs = dict(odeint_kwargs or {})
    if method in WHOLE_METHODS or odeint_kwargs.get("options"):  # only these make use of them
        if grad_steps is not None and len(chosen) not in (0, steps):
            raise ValueError(
                f"grad_steps: expected a method that steps through the grid, {STEPWISE_METHODS} without"
                f" options, got {method!r} with {odeint_kwargs}; pass grad_steps=None"
            )
        function = with_gradient if chosen else without
        states = odeint(lambda time, x: function(x, time), x0, t, method=method, **odeint_kwargs)
        return list(states.unbind())
    step = STEPS.get(method) or torchdiffeq_step(method)
    functions = [with_gradient if k in chosen else without for k in range(steps)]
    cut = steps - grad_steps if isinstance(grad_steps, int) else None
    return _states(step, functions, x0, t, cut)


def _states(
    step: Callable[..., Tensor], functions: list[Velocity], x0: Tensor, t: Tensor, cut: int | None
) -> list[Tensor]:
    """States before, between and after the steps; the state at index `cut` is detached."""
    states = [x0.detach() if cut == 0 else x0]
    for k, (start, end) in enumerate(pairwise(t.unbind()), start=1):
        x = step(functions[k - 1], states[-1], start, end)
        states.append(x.detach() if k == cut else x)
    return states


def _chosen_steps(grad_steps: GradSteps, steps: int) -> frozenset[int]:
    if grad_steps is None:
        return frozenset(range(steps))
    wanted = range(steps - grad_steps, steps) if isinstance(grad_steps, int) else grad_steps
    if (isinstance(grad_steps, int) and grad_steps < 0) or any(not 0 <= k < steps for k in wanted):
        raise ValueError(f"grad_steps: expected 0..{steps} or indices below {steps}, got {grad_steps}")
    return frozenset(wanted)


def without_gradient(velocity: Velocity) -> Velocity:
    """`velocity` as a constant, in the dtype of x."""

    @torch.no_grad()
    def run(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, t).to(x.dtype)

    return run


def _euler(velocity: Velocity, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return x + (end - start) * velocity(x, start)


def _midpoint(velocity: Velocity, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    half = (end - start) / 2
    return x + (end - start) * velocity(x + half * velocity(x, start), start + half)


STEPS: Mapping[str, Callable[..., Tensor]] = {"euler": _euler, "midpoint": _midpoint}
"""Steps that are written out: (velocity, x, start, end) -> x at the end."""


def torchdiffeq_step(method: str) -> Callable[..., Tensor]:
    """One step of torchdiffeq's `method`, called as those of STEPS: (velocity, x, start, end) -> x at the end."""

    def step(velocity: Velocity, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        states: Tensor = odeint(lambda t, y: velocity(y, t), x, torch.stack((start, end)), method=method)
        return states[-1]

    return step
