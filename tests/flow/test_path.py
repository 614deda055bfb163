"""The straight path: its algebra, and its score against the density of a Gaussian."""

from __future__ import annotations

import pytest
import torch
from problems import LinearGaussianFlow
from torch.testing import assert_close

from rlhf_mel.flow import path

EXACT = dict(rtol=1e-12, atol=1e-12)


def noise_and_mel() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 5, 2, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def test_literal_values() -> None:
    x0, x1 = torch.tensor([[2.0]]), torch.tensor([[10.0]])
    assert path.interpolate(x0, x1, 0.25).item() == 4.0  # 0.75 * 2 + 0.25 * 10
    assert path.velocity(x0, x1).item() == 8.0
    assert path.endpoint(torch.tensor([[4.0]]), torch.tensor([[8.0]]), 0.25).item() == 10.0
    assert path.noise_from_velocity(torch.tensor([[4.0]]), torch.tensor([[8.0]]), 0.25).item() == 2.0
    assert path.score(torch.tensor([[4.0]]), torch.tensor([[8.0]]), 0.25).item() == pytest.approx(-2.0 / 0.75)


@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.5, 0.9]), torch.rand(3, 1, 1)])
def test_both_ends_come_back_from_a_point_and_its_velocity(t: path.Time) -> None:
    x0, x1 = noise_and_mel()
    x, v = path.interpolate(x0, x1, t), path.velocity(x0, x1)
    assert_close(path.endpoint(x, v, t), x1, rtol=1e-6, atol=1e-6)  # t itself may be float32
    assert_close(path.noise_from_velocity(x, v, t), x0, rtol=1e-6, atol=1e-6)
    assert_close(path.velocity_from_endpoint(x, x1, t), v, rtol=1e-5, atol=1e-5)


def test_one_time_an_item_is_each_item_at_its_own_time() -> None:
    x0, x1 = noise_and_mel()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    together = path.interpolate(x0, x1, t)
    for item in range(3):
        assert_close(together[item], path.interpolate(x0[item], x1[item], t[item].item()), **EXACT)
    with pytest.raises(ValueError, match=r"expected a scalar or \[3\], one for each item, got \[2\]"):
        path.interpolate(x0, x1, torch.rand(2))


def test_score_is_the_gradient_of_the_log_density() -> None:
    """x_t ~ N(t mean, s_t^2): the score is (t mean - x) / s_t^2, here by autograd of the log density."""
    flow = LinearGaussianFlow(mean=0.7, deviation=0.4)
    x, _ = noise_and_mel()
    x.requires_grad_()
    for t in (torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)):
        density = torch.distributions.Normal(t * flow.mean, flow.scale(t)).log_prob(x).sum()
        (expected,) = torch.autograd.grad(density, x)
        v = flow.velocity(x.detach(), t)
        assert_close(path.score(x.detach(), v, t), expected, **EXACT)
        assert_close(path.velocity_from_score(x.detach(), expected, t), v, **EXACT)


def test_the_problem_itself_is_right() -> None:
    """The stated velocity is E[x_1 - x_0 | x_t], regressed on 400,000 draws (4 deviations of the fit: 0.01)."""
    flow, generator = LinearGaussianFlow(), torch.Generator().manual_seed(1)
    x0 = torch.randn(400_000, generator=generator, dtype=torch.float64)
    x1 = flow.mean + flow.deviation * torch.randn(400_000, generator=generator, dtype=torch.float64)
    t = torch.tensor(0.35, dtype=torch.float64)
    x, v = path.interpolate(x0, x1, t), path.velocity(x0, x1)
    design = torch.stack((torch.ones_like(x), x), dim=1)
    intercept, slope = torch.linalg.lstsq(design, v[:, None]).solution[:, 0]
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert abs(intercept - flow.velocity(zero, t)) < 0.01
    assert abs(slope - (flow.velocity(one, t) - flow.velocity(zero, t))) < 0.01
