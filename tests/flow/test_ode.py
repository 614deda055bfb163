"""Solvers on a flow whose solution is known, the time grids of F5-TTS, and where gradients flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import LinearGaussianFlow
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_mel.flow import ode, recompute
from rlhf_mel.flow.ode import solve, timesteps

FLOW = LinearGaussianFlow()
X0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


def grid(steps: int) -> Tensor:
    return timesteps(steps, use_epss=False, dtype=torch.float64)


def order_of(method: str, velocity: recompute.Velocity, end: Tensor) -> float:
    """log2 of how much smaller the error becomes as the step is halved."""
    errors = [(solve(velocity, X0, grid(steps), method=method)[-1] - end).abs().max().item() for steps in (64, 128)]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("method", ORDERS)
def test_convergence_order(method: str) -> None:
    """On dx/dt = x cos t, whose solution is x_0 exp(sin t)."""
    order = order_of(method, lambda x, t: x * torch.cos(t), X0 * math.exp(math.sin(1.0)))
    assert abs(order - ORDERS[method]) < 0.1
    assert set(ORDERS) == set(ode.STEPWISE_METHODS)


@pytest.mark.parametrize("method", ORDERS)
def test_convergence_order_on_the_gaussian_flow(method: str) -> None:
    """Midpoint is better than its order here: its leading error vanishes where x_t^2 is quadratic in t."""
    order = order_of(method, FLOW.velocity, FLOW.solution(X0, torch.tensor(1.0, dtype=torch.float64)))
    assert abs(order - (3 if method == "midpoint" else ORDERS[method])) < 0.1


@pytest.mark.parametrize("method", ode.WHOLE_METHODS)
def test_other_methods_of_torchdiffeq_arrive(method: str) -> None:
    t = grid(512)
    states = solve(FLOW.velocity, X0, t, method=method, odeint_kwargs=dict(rtol=1e-6, atol=1e-6))
    assert len(states) == 513 and torch.equal(states[0], X0)
    for state, time in zip(states[::128], t[::128], strict=True):
        assert_close(state, FLOW.solution(X0, time), rtol=1e-3, atol=1e-3)


def test_options_reach_torchdiffeq() -> None:
    """Two grid points, but steps of 1/64: as good as 64 steps."""
    states = solve(FLOW.velocity, X0, grid(1), method="euler", odeint_kwargs=dict(options=dict(step_size=1 / 64)))
    assert_close(states[-1], solve(FLOW.velocity, X0, grid(64))[-1], rtol=1e-9, atol=1e-9)


def test_euler_and_midpoint_are_those_of_torchdiffeq() -> None:
    from torchdiffeq import odeint

    t = timesteps(8, sway_sampling_coef=-1.0, dtype=torch.float64)
    for method in ("euler", "midpoint"):
        theirs = odeint(lambda time, x: FLOW.velocity(x, time), X0, t, method=method)
        assert_close(torch.stack(solve(FLOW.velocity, X0, t, method=method)), theirs, rtol=1e-13, atol=1e-13)


# Time grids.


def test_uniform_and_epss_grids() -> None:
    assert timesteps(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert (timesteps(5) * 32).tolist() == [0, 2, 4, 8, 16, 32]
    assert timesteps(5, use_epss=False).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert timesteps(5, t_start=0.5).tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1])
    for steps in ode.EPSS_GRID_32NDS:
        t = timesteps(steps)
        assert len(t) == steps + 1 and t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()


def test_sway_at_minus_one_is_one_minus_cosine() -> None:
    """t - (cos(pi t / 2) - 1 + t) = 1 - cos(pi t / 2): 32 steps begin 0, .0012, .0048, .0108, the last is .049."""
    t = timesteps(32, sway_sampling_coef=-1.0)
    assert t[:4].tolist() == pytest.approx([0, 0.0012, 0.0048, 0.0108], abs=5e-5)
    assert (t[-1] - t[-2]).item() == pytest.approx(0.0491, abs=5e-5)
    assert_close(t, 1 - torch.cos(math.pi / 2 * torch.linspace(0, 1, 33)), rtol=0, atol=1e-6)


def test_grids_keep_float32_in_half_precision_models() -> None:
    t = timesteps(32, sway_sampling_coef=-1.0, dtype=torch.float16)
    assert t.dtype == torch.float32 and (t.diff() > 0).all()


def test_half_precision_states_stay_half() -> None:
    states = solve(lambda x, t: FLOW.velocity(x, t), X0.half(), timesteps(4))
    assert {state.dtype for state in states} == {torch.float16}


# Gradients. The velocity has a weight, so that d x_1 / d weight depends on which steps are differentiated.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))
        self.calls: list[bool] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return torch.tanh(self.weight * x) + t


def gradient(**options: Any) -> Tensor:
    net = Net()
    solve(net, X0, grid(4), **options)[-1].square().sum().backward()
    assert net.weight.grad is not None
    return net.weight.grad


def by_hand(keep: Callable[[int], bool], cut: int | None = None) -> Tensor:
    """Euler with `.detach()` on the velocity of the steps that are not kept, and on the state at `cut`."""
    net, x, t = Net(), X0, grid(4)
    for k in range(4):
        x = x.detach() if k == cut else x
        v = net(x, t[k])
        x = x + (t[k + 1] - t[k]) * (v if keep(k) else v.detach())
    x.square().sum().backward()
    assert net.weight.grad is not None
    return net.weight.grad


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("grad_steps", [1, 2, 3, 4])
def test_the_last_k_steps(grad_steps: int, checkpoint: bool) -> None:
    found = gradient(grad_steps=grad_steps, checkpoint=checkpoint)
    assert_close(found, by_hand(lambda k: k >= 4 - grad_steps, cut=4 - grad_steps), rtol=1e-12, atol=0)


@pytest.mark.parametrize("chosen", [{0}, {1, 2}, {0, 3}, (2,), range(4)])
def test_a_set_of_steps(chosen: Any) -> None:
    """Elsewhere the velocity is a constant: the state's own gradient passes by, and reaches earlier chosen steps."""
    assert_close(gradient(grad_steps=chosen), by_hand(lambda k: k in chosen), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [*ode.STEPWISE_METHODS, "dopri5"])
@pytest.mark.parametrize("grad_steps", [0, (), frozenset()])
def test_no_steps_no_gradient(method: str, grad_steps: Any) -> None:
    net = Net()
    states = solve(net, X0, grid(4), method=method, grad_steps=grad_steps)
    assert not states[-1].requires_grad and not any(net.calls)


@pytest.mark.parametrize("method", [*ode.STEPWISE_METHODS, "dopri5", "explicit_adams"])
def test_checkpointed_gradient_is_the_plain_one(method: str) -> None:
    options = dict(method=method, odeint_kwargs=dict(rtol=1e-4, atol=1e-4))
    assert_close(gradient(checkpoint=True, **options), gradient(checkpoint=False, **options), rtol=1e-12, atol=0)


def test_steps_without_gradient_run_without_graph() -> None:
    net = Net()
    solve(net, X0, grid(4), grad_steps=1, checkpoint=False)
    assert net.calls == [False, False, False, True]


def test_the_initial_state_gets_its_gradient() -> None:
    """d x_1 / d x_0 of the exact flow is its deviation; of Euler, the product of 1 + h slope(t_k)."""
    x0 = X0.clone().requires_grad_()
    (found,) = torch.autograd.grad(solve(FLOW.velocity, x0, grid(512))[-1].sum(), x0)
    assert_close(found, torch.full_like(found, FLOW.deviation), rtol=5e-3, atol=0)
    truncated = solve(FLOW.velocity, x0, grid(4), grad_steps=2)[-1]
    assert not truncated.requires_grad


def test_weights_get_their_gradient_once_whatever_backward_went_before() -> None:
    matrix = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    unused = nn.Parameter(torch.ones(1, dtype=torch.float64))
    velocity = recompute.PureVelocity(lambda x, t, cond: x @ matrix * t + cond, X0, lambda: [matrix, unused])
    x0 = X0.clone().requires_grad_()
    plain, checkpointed = (
        solve(velocity, x0, grid(3), checkpoint=checkpoint)[-1].square().sum() for checkpoint in (False, True)
    )
    expected = torch.autograd.grad(plain, [x0, matrix])
    (alone,) = torch.autograd.grad(checkpointed, [x0], retain_graph=True)  # sums of weights are left over
    assert_close(alone, expected[0], rtol=1e-12, atol=1e-12)
    checkpointed.backward(retain_graph=True)
    assert_close(matrix.grad, expected[1], rtol=1e-12, atol=1e-12)
    checkpointed.backward()
    assert_close(matrix.grad, 2 * expected[1], rtol=1e-12, atol=1e-12)
    assert unused.grad is None


def test_weights_written_to_since_are_refused() -> None:
    weight = torch.ones((), requires_grad=True)
    velocity = recompute.PureVelocity(lambda x, t, cond: -weight * x, None, lambda: [weight])
    loss = solve(velocity, X0, grid(3))[-1].sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_checkpoint_keeps_only_states() -> None:
    """Bytes that autograd saves: with checkpoint, a state a step; without, the net's activations too."""

    def saved(steps: int, checkpoint: bool) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size() * (tensor.ndim > 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            solve(Net(), X0, grid(steps), checkpoint=checkpoint)
        return total

    state = X0.numel() * 8
    assert saved(8, checkpoint=True) <= 8 * state
    assert saved(8, checkpoint=False) >= 8 * 2 * state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="magic"), "ODE method: expected one of .* got 'magic'"),
        (dict(grad_steps=5), r"grad_steps: expected 0..4 .* got 5"),
        (dict(grad_steps=-1), r"grad_steps: expected 0..4 .* got -1"),
        (dict(grad_steps={4}), r"grad_steps: expected 0..4 .* got \{4\}"),
        (dict(grad_steps=2, method="dopri5"), "steps through the grid.* got 'dopri5'"),
        (dict(grad_steps=2, odeint_kwargs=dict(options=dict(step_size=0.1))), "without options, got 'euler'"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(Net(), X0, grid(4), **options)
