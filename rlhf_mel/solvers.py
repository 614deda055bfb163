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
of steps (tests/test_sde.py). The first two add no noise in the last step, the third hiss.

References: Liu et al. 2025, Flow-GRPO, arXiv 2505.05470; Wang & Yu 2025, Flow-CPS, arXiv 2509.05952; both as in
github.com/yifan123/flow_grpo, whose time runs the other way. Zou et al. 2026, Precise, arXiv 2605.23522, finds the same
fault and holds x_1 fixed too. The exact linear part is that of SDE-DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint as recompute
from torchdiffeq import odeint

from rlhf_mel.path import noise_from_velocity, score

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t scalar tensor) -> dx/dt [B, ...]."""

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
) -> Tensor:
    """Increasing times [steps + 1] from t_start to 1, at least float32: half precision merges the first."""
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
    x0: Tensor,
    t: Tensor,
    *,
    method: str = "euler",
    grad_steps: GradSteps = None,
    checkpoint: bool = True,
    constant: Velocity | None = None,
    preserve_rng_state: bool = False,
    odeint_kwargs: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """The K + 1 states [B, ...] of dx/dt = velocity(x, t) at times t [K + 1], beginning with x0 [B, ...].

    A list, because stacking costs the gradient of the last state a copy of them all.

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
    without = _constant(constant or velocity)
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
    step = _STEPS.get(method) or _torchdiffeq_step(method)
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


class Weights:
    """Parameters for all velocities of a solve: their gradients are summed here, and reach them once, not once a step.

    Else autograd would hold a sum of its own beside what each step returns: three times the weights' size.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.lender: Any = None
        """A GradientGraphs that has more of the sums: gradients.py."""
        self._sums: list[Tensor | None] = []
        self._task = -1

    def token(self) -> Tensor | None:
        """What a velocity must take to have its gradients summed: it stands for all parameters. None without any."""
        token: Any = _SummedOnce.apply(self, *self.parameters) if self.parameters else None
        return token

    def begin(self) -> None:
        """Forget what a backward() before this one has left, if it never came to an end."""
        if self._task != torch._C._current_graph_task_id():
            self._task = torch._C._current_graph_task_id()
            self._sums = [None] * len(self.parameters)
            self.lender = None

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        self.begin()
        _add_(self._sums, gradients)

    def take(self) -> list[Tensor | None]:
        """The sums; none are left."""
        self.begin()
        if self.lender is not None:
            self.lender.hand_over(self)
        sums, self._sums = self._sums, [None] * len(self.parameters)
        return sums


class _SummedOnce(torch.autograd.Function):
    """Parameters to a token; their gradient is what Weights has, when the last velocity that took it is through."""

    @staticmethod
    def forward(ctx: Any, weights: Weights, *parameters: Tensor) -> Tensor:
        ctx.weights = weights
        ctx.save_for_backward(*parameters)
        ctx.set_materialize_grads(False)
        return parameters[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _ = ctx.saved_tensors  # says so if one was written to since
        return None, *ctx.weights.take()


class Autocast(NamedTuple):
    """The autocast that is on, to be entered again. Without its cache: that must not outlive a CUDA graph."""

    device: str
    dtype: torch.dtype | None
    """None: it is off."""

    @classmethod
    def now(cls, device: str) -> Autocast:
        return cls(device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def __call__(self) -> Any:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None, cache_enabled=False)


@dataclass(frozen=True)
class Rerun:
    """A velocity as a function of the leaves of (x, t, part of cond), in the dtype of x."""

    function: Callable[[Tensor, Tensor, Any], Tensor]
    structure: Any
    autocast: Autocast

    def __call__(self, leaves: Sequence[Any]) -> Tensor:
        x, t, part = tree_unflatten(leaves, self.structure)
        with self.autocast():
            return self.function(x, t, part).to(x.dtype)


def differentiate(
    run: Callable[[Sequence[Any]], Tensor], leaves: Sequence[Any], weights: Weights, cotangent: Tensor
) -> Sequence[Tensor | None]:
    """Gradients of <run(leaves), cotangent> by the leaves that have one; the weights' own are added to `weights`."""
    wanted = [leaf for leaf in leaves if _has_gradient(leaf)]
    with torch.enable_grad():
        v = run(leaves)
    found = torch.autograd.grad(v, [*wanted, *weights.parameters], cotangent, allow_unused=True)
    weights.add(found[len(wanted) :])
    return found[: len(wanted)]


@dataclass(frozen=True)
class PureVelocity:
    """A velocity that says all it computes with, so that it can run anew in backward() without being traced before.

    Its first run makes no graph, and so may take the fast way of fast.py.
    """

    function: Callable[[Tensor, Tensor, Any], Tensor]
    """(x, t, cond) -> dx/dt."""
    cond: Any
    """A pytree."""
    parameters: Callable[[], Sequence[Tensor]]
    """Weights that have a gradient; asked for when a solve begins that makes one."""
    terms: Callable[[Any], Sequence[tuple[Any, float]]] = lambda cond: [(cond, 1.0)]
    """cond -> [(its part, factor)]: dx/dt = sum of factor * function(x, t, part). In backward() one term at a time runs
    and holds its graph."""
    differentiate: Callable[..., Sequence[Tensor | None]] = differentiate
    """The function above, or one that does the same sooner."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t, self.cond)


def differentiated(velocity: Velocity, checkpoint: bool, preserve_rng_state: bool = False) -> Velocity:
    """`velocity` in the dtype of x; with `checkpoint` it keeps only its input and runs again in backward()."""
    shared: list[Any] = []

    def run(x: Tensor, t: Tensor) -> Tensor:
        if not (checkpoint and torch.is_grad_enabled()):
            return velocity(x, t).to(x.dtype)
        if isinstance(velocity, PureVelocity) and not preserve_rng_state:
            if not shared:
                weights = Weights(velocity.parameters())
                shared.extend((weights, weights.token(), *tree_flatten(velocity.cond)))
            weights, token, leaves, structure = shared
            return _Recomputed.apply(velocity, weights, structure, token, x, t, *leaves)
        # not reentrant: gradients also reach what `velocity` closes over, such as the text embedding
        return recompute(velocity, x, t, use_reentrant=False, preserve_rng_state=preserve_rng_state).to(x.dtype)

    return run


class _Recomputed(torch.autograd.Function):
    """A pure velocity whose graph is made in backward() and dropped there: one is held at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        velocity: PureVelocity,
        weights: Weights,
        structure: Any,
        token: Tensor | None,
        x: Tensor,
        t: Tensor,
        *leaves: Any,
    ) -> Tensor:
        ctx.velocity, ctx.weights, ctx.structure = velocity, weights, structure
        ctx.autocast = Autocast.now(x.device.type)
        ctx.save_for_backward(x, t, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        ctx.others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        return velocity(x, t).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, t, *saved = ctx.saved_tensors
        tensors = iter(saved)
        reads = [next(tensors) if other is None else other[0] for other in ctx.others]
        # cut off from the graph that made them, or autograd would go on into it, and free it
        needed = ctx.needs_input_grad[4:]
        inputs = [_leaf(value, need) for value, need in zip((x, t, *reads), needed, strict=True)]
        with torch.enable_grad():
            terms = ctx.velocity.terms(tree_unflatten(inputs[2:], ctx.structure))
        found: list[Tensor | None] = [None] * sum(needed)
        for part, factor in terms:
            ends, structure = tree_flatten((inputs[0], inputs[1], part))
            leaves = [_leaf(end, _has_gradient(end)) for end in ends]
            run = Rerun(ctx.velocity.function, structure, ctx.autocast)
            gradients = ctx.velocity.differentiate(run, leaves, ctx.weights, factor * grads[0])
            _add_(found, _pulled_back(ends, gradients, [value for value in inputs if _has_gradient(value)]))
        own = iter(found)
        return None, None, None, None, *(next(own) if need else None for need in needed)


def _pulled_back(
    ends: Sequence[Any], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """What gradients of `ends`, those that have one, are as gradients of the inputs that they were made of."""
    known = [
        (end, gradient)
        for end, gradient in zip(filter(_has_gradient, ends), gradients, strict=True)
        if gradient is not None
    ]
    if not known:
        return [None] * len(inputs)
    outputs, cotangents = zip(*known, strict=True)
    return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)


def _add_(sums: list[Tensor | None], more: Sequence[Tensor | None]) -> None:
    """Add to `sums`, in place where a sum has its memory to itself."""
    owners = Counter(total.untyped_storage().data_ptr() for total in sums if total is not None)
    own: list[tuple[Tensor, Tensor]] = []
    for k, value in enumerate(more):
        total = sums[k]
        if total is None or value is None:
            sums[k] = value if total is None else total
        elif total.is_contiguous() and owners[total.untyped_storage().data_ptr()] == 1:
            own.append((total, value))
        else:
            sums[k] = total + value
    if own:
        torch._foreach_add_([total for total, _ in own], [value for _, value in own])


def _leaf(value: Any, needs_gradient: bool) -> Any:
    return value.detach().requires_grad_(needs_gradient) if isinstance(value, Tensor) else value


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _constant(velocity: Velocity) -> Velocity:
    @torch.no_grad()
    def run(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, t).to(x.dtype)

    return run


def _euler(velocity: Velocity, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return x + (end - start) * velocity(x, start)


def _midpoint(velocity: Velocity, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    half = (end - start) / 2
    return x + (end - start) * velocity(x + half * velocity(x, start), start + half)


_STEPS: Mapping[str, Callable[..., Tensor]] = {"euler": _euler, "midpoint": _midpoint}


def _torchdiffeq_step(method: str) -> Callable[..., Tensor]:
    def step(velocity: Velocity, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return odeint(lambda t, y: velocity(y, t), x, torch.stack((start, end)), method=method)[-1]

    return step


SDE_KINDS = ("exponential", "flow_cps", "flow_sde")


class Transition(NamedTuple):
    """Where a step leads: x' ~ N(mean, std^2), all elements independent."""

    mean: Tensor
    """[B, T, M]."""
    std: Tensor
    """Scalar, above 0 where there is noise."""


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

    def transition(self, x: Tensor, v: Tensor, t: Tensor, step: int, moved: Tensor | None = None) -> Transition:
        """The step from t[step] to t[step + 1], at x [B, T, M] with velocity v, at least float32.

        moved: bool [B, T]; the other frames take Euler's step of the ODE. Noise in some frames only leaves the
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
    x0: Tensor,
    t: Tensor,
    sde: SDE,
    noise: Callable[[], Tensor],
    *,
    window: range,
    moved: Tensor | None = None,
    method: str = "euler",
) -> tuple[list[Tensor], list[Transition]]:
    """The K + 1 states [B, T, M] from x0 on, at least float32, and what the steps of `window` were drawn from.

    Outside the window the steps are those of `solve`, by `method`.

    noise: standard normal like x0, anew at each call; called once a step of the window.
    moved: bool [B, T], the frames that noise is added to; None: all.
    """
    if method not in STEPWISE_METHODS:
        raise ValueError(f"ODE method beside SDE steps: expected one of {STEPWISE_METHODS}, got {method!r}")
    ode_step = _STEPS.get(method) or _torchdiffeq_step(method)
    function = _constant(velocity)
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


def mean_log_prob(x: Tensor, transition: Transition, counted: Tensor) -> Tensor:
    """Mean [B] of log N(x; mean, std^2) over the elements of the frames `counted`, bool [B, T].

    A mean, as in flow_grpo, so that ratios of long and short items are alike: the log-density of an item is this
    times its number of elements, and a ratio of two such means is no ratio of likelihoods but its D-th root.
    """
    standard = (x - transition.mean) / transition.std
    return counted_mean(-standard.square() / 2 - transition.std.log() - math.log(2 * math.pi) / 2, counted)


def transition_kl(transition: Transition, reference: Tensor, counted: Tensor) -> Tensor:
    """KL [B] from N(mean, std^2) to N(reference, std^2), (mean - reference)^2 / (2 std^2), as a mean likewise."""
    return counted_mean(((transition.mean - reference) / transition.std).square() / 2, counted)


def counted_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean [B] of `values` [B, T, M] over the frames `counted`, bool [B, T]."""
    return values.mean(-1).where(counted, 0.0).sum(-1) / counted.sum(-1)
