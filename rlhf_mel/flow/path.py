"""THE time convention: t = 0 is noise, t = 1 is mel, and the path between them is a straight line.

    x_t = (1 - t) x_0 + t x_1,    x_0 ~ N(0, I),    v = dx_t/dt = x_1 - x_0

A network that predicts v therefore also predicts both ends, x_1 = x_t + (1 - t) v and x_0 = x_t - t v, and
the score of the marginal density, grad log p_t(x_t) = -E[x_0 | x_t] / (1 - t) = (t v - x_t) / (1 - t).

Reference: Lipman et al. 2023 (arXiv:2210.02747), their sigma_min = 0; Albergo et al. 2023 (arXiv:2303.08797)
for the score.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

Time = float | Tensor
"""A number, a scalar tensor, or one time an item [b]."""


State = Float[Tensor, "b *item"]
"""Noise, mel, what lies between them, and its velocity; an item has frames and channels."""


def per_item(t: Time, like: State) -> Time:
    """t [b] reshaped to [b, 1, ...] so that it multiplies `like`; a scalar, or [b, 1, ...], is left alone."""
    if not isinstance(t, Tensor) or t.ndim in (0, like.ndim):
        return t
    if t.ndim != 1 or t.shape[0] not in (1, like.shape[0]):
        raise ValueError(f"time: expected a scalar or [{like.shape[0]}], one for each item, got {list(t.shape)}")
    return t.reshape(-1, *(1,) * (like.ndim - 1))


def interpolate(x0: State, x1: State, t: Time) -> State:
    """x_t = (1 - t) x_0 + t x_1."""
    t = per_item(t, x1)
    return (1 - t) * x0 + t * x1


def velocity(x0: State, x1: State) -> State:
    """v = x_1 - x_0, the target of flow matching."""
    return x1 - x0


def endpoint(x: State, v: State, t: Time) -> State:
    """The mel where the straight line through (t, x) with slope v ends: x_1 = x_t + (1 - t) v."""
    return x + (1 - per_item(t, x)) * v


def noise_from_velocity(x: State, v: State, t: Time) -> State:
    """The noise where that line begins: x_0 = x_t - t v."""
    return x - per_item(t, x) * v


def velocity_from_endpoint(x: State, x1: State, t: Time) -> State:
    """v = (x_1 - x_t) / (1 - t); singular at t = 1."""
    return (x1 - x) / (1 - per_item(t, x))


def score(x: State, v: State, t: Time) -> State:
    """grad log p_t(x_t) = (t v - x_t) / (1 - t); singular at t = 1."""
    t = per_item(t, x)
    return (t * v - x) / (1 - t)


def velocity_from_score(x: State, s: State, t: Time) -> State:
    """v = (x_t + (1 - t) s) / t; singular at t = 0."""
    t = per_item(t, x)
    return (x + (1 - t) * s) / t
