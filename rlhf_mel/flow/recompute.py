"""Gradients of velocities without their activations: a velocity runs again in backward().

A solve keeps x_t of each step alone; gradients of weights are summed once a solve (`Weights`) and not once a step. What
a velocity was computed under (autocast, train or eval mode) is entered again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint as recompute

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t scalar tensor) -> dx/dt [B, ...]."""


class Weights:
    """Parameters for all velocities of a solve: their gradients are summed here, and reach them once, not once a step.

    Else autograd would hold a sum of its own beside what each step returns: three times the weights' size.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.lender: Any = None
        """A GradientGraphs that has more of the sums: f5/speed/gradients.py."""
        self._sums: list[Tensor | None] = []
        self._task = -1

    def token(self) -> Tensor | None:
        """What a velocity must take to have its gradients summed: it stands for all parameters. None without any."""
        token: Tensor | None = _SummedOnce.apply(self, *self.parameters) if self.parameters else None
        return token

    def begin(self) -> None:
        """Forget what a backward() before this one has left, if it never came to an end."""
        if self._task != torch._C._current_graph_task_id():
            self._task = torch._C._current_graph_task_id()
            self._sums = [None] * len(self.parameters)
            self.lender = None

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one gradient a parameter, None where it has none."""
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
        """That of the device type at this moment."""
        return cls(device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def __call__(self) -> Any:
        """The context to enter."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None, cache_enabled=False)


@dataclass(frozen=True)
class Rerun:
    """A velocity as a function of the leaves of (x, t, part of cond), in the dtype of x."""

    function: Callable[[Tensor, Tensor, Any], Tensor]
    structure: Any
    autocast: Autocast

    def __call__(self, leaves: Sequence[Any]) -> Tensor:
        """The velocity at these leaves of (x, t, part of cond)."""
        x, t, part = tree_unflatten(leaves, self.structure)
        with self.autocast():
            return self.function(x, t, part).to(x.dtype)


def differentiate(
    run: Callable[[Sequence[Any]], Tensor], leaves: Sequence[Any], weights: Weights, cotangent: Tensor
) -> Sequence[Tensor | None]:
    """Gradients of <run(leaves), cotangent> for the leaves that have one; those of weights are added to `weights`."""
    wanted = [leaf for leaf in leaves if _has_gradient(leaf)]
    with torch.enable_grad():
        v = run(leaves)
    found = torch.autograd.grad(v, [*wanted, *weights.parameters], cotangent, allow_unused=True)
    weights.add(found[len(wanted) :])
    return found[: len(wanted)]


@dataclass(frozen=True)
class PureVelocity:
    """A velocity that says all it computes with, so that it can run anew in backward() without being traced before.

    Its first run makes no graph, and so may take the fast way of f5/speed/sampling.py.
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

    @property
    def fast(self) -> bool:
        """Whether its gradient has a way of its own, sooner or in less memory than autograd's."""
        return self.differentiate is not differentiate or len(self.terms(self.cond)) > 1

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt, of the shape of x."""
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
            v: Tensor = _Recomputed.apply(velocity, weights, structure, token, x, t, *leaves)
            return v
        # not reentrant: gradients also reach what `velocity` closes over, such as the text embedding
        v = recompute(velocity, x, t, use_reentrant=False, preserve_rng_state=preserve_rng_state)
        return v.to(x.dtype)

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
        cond = tree_unflatten(inputs[2:], ctx.structure)
        own = iter(pull_back(ctx.velocity, (*inputs[:2], cond), ctx.autocast, ctx.weights, grads[0]))
        return None, None, None, None, *(next(own) if need else None for need in needed)


def pull_back(
    velocity: PureVelocity, at: tuple[Tensor, Tensor, Any], autocast: Autocast, weights: Weights, cotangent: Tensor
) -> list[Tensor | None]:
    """Vector-Jacobian product of `velocity` at (x, t, cond): for the leaves of `at` that have a gradient, in order.

    Those of the weights are added to `weights`.
    """
    x, t, cond = at
    inputs = [value for value in tree_flatten(at)[0] if _has_gradient(value)]
    with torch.enable_grad():
        terms = velocity.terms(cond)
    found: list[Tensor | None] = [None] * len(inputs)
    for part, factor in terms:
        ends, structure = tree_flatten((x, t, part))
        leaves = [_leaf(end, _has_gradient(end)) for end in ends]
        run = Rerun(velocity.function, structure, autocast)
        gradients = velocity.differentiate(run, leaves, weights, factor * cotangent)
        _add_(found, _pulled_back(ends, gradients, inputs))
    return found


def _pulled_back(
    ends: Sequence[Any], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Vector-Jacobian product from `ends`, with a gradient for those that have one, to the inputs that made them."""
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
