"""Kernels beside PyTorch's own gradients; without a GPU by Triton's interpreter (conftest.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_mel.f5.kernels import (
    convolved,
    gate_gradient,
    gelu_gradient,
    grouped_convolution,
    norm_gradient,
    packed,
    takes,
    turn_,
    turned_back,
)
from rlhf_mel.f5.layers import Rope, apply_rope, rotary_table

pytestmark = pytest.mark.rounding

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]  # the interpreter lacks bfloat16
ERRORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of |found - expected| / |expected|: about the spacing of the dtype's numbers."""


def problem(dtype: torch.dtype, groups: int = 3, channels: int = 16, taps: int = 7) -> list[Tensor]:
    """x [2, 150, 48], weight, bias, and a cotangent of the result."""
    generator = torch.Generator().manual_seed(0)
    width = groups * channels
    shapes = (2, 150, width), (width, channels, taps), (width,), (2, 150, width)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def far(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_and_its_gradients(dtype: torch.dtype) -> None:
    *inputs, cotangent = problem(dtype)
    exact = [value.double().requires_grad_() for value in inputs]
    expected = F.conv1d(exact[0].transpose(1, 2), exact[1], exact[2], padding=3, groups=3).transpose(1, 2)
    ours = [value.requires_grad_() for value in inputs]
    found = grouped_convolution(*ours)
    assert found.dtype == dtype
    assert far(found, expected) < ERRORS[dtype]
    gradients = torch.autograd.grad(found, ours, cotangent)
    for own, theirs in zip(gradients, torch.autograd.grad(expected, exact, cotangent.double()), strict=True):
        assert far(own, theirs) < ERRORS[dtype]


def test_strided_input_is_read_as_it_is_meant() -> None:
    x, weight, bias, _ = problem(DTYPES[0])
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(convolved(apart, packed(weight), bias), convolved(x, packed(weight), bias))


@pytest.mark.parametrize(
    ("convolution", "expected"),
    [
        (nn.Conv1d(48, 48, 31, groups=3, padding=15), True),
        (nn.Conv1d(48, 48, 31, groups=3, padding=14), False),
        (nn.Conv1d(48, 48, 30, groups=3, padding=15), False),
        (nn.Conv1d(48, 96, 31, groups=3, padding=15), False),
        (nn.Conv1d(24, 24, 31, groups=3, padding=15), False),  # 8 channels a group
        (nn.Conv1d(48, 48, 31, groups=3, padding=15, bias=False), False),
        (nn.Conv1d(48, 48, 31, groups=3, padding=15, stride=2), False),
    ],
)
def test_takes_what_it_can_compute(convolution: nn.Conv1d, expected: bool) -> None:
    assert takes(convolution) == expected


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("items", [1, 3])
def test_gradient_of_a_modulated_norm(dtype: torch.dtype, items: int) -> None:
    x, passed, of_out, modulation = drawn(*[(3, 50, 48)] * 3, (items, 1, 96), dtype=dtype)
    exact = [value.double().requires_grad_() for value in (x, *modulation.chunk(2, dim=-1))]
    out = F.layer_norm(exact[0], (48,), eps=1e-6) * (1 + exact[1]) + exact[2]
    expected = torch.autograd.grad((exact[0], out), exact, (passed.double(), of_out.double()))
    of_x, sums = norm_gradient(x, modulation[..., :48], passed, of_out, 1e-6)
    assert of_x.dtype == dtype and sums.dtype == torch.float32
    for own, theirs in zip((of_x, *sums.unsqueeze(2).unbind(1)), expected, strict=True):
        assert far(own, theirs) < ERRORS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("items", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_a_gated_branch(dtype: torch.dtype, items: int, masked: bool) -> None:
    x, grad, modulation, bias = drawn(*[(3, 50, 48)] * 2, (items, 1, 96), (48,), dtype=dtype)
    mask = torch.arange(50, device=DEVICE) < torch.tensor([[50], [31], [7]], device=DEVICE) if masked else None
    branch = x + bias
    exact = [value.double().requires_grad_() for value in (branch, modulation[..., 48:], bias)]
    added = exact[2] - exact[2].detach()  # the bias is in the branch, where the mask lets it in
    silenced = added if mask is None else added * mask.unsqueeze(-1)
    expected = torch.autograd.grad(exact[1] * (exact[0] + silenced), exact, grad.double())
    of_branch, sums = gate_gradient(branch, modulation[..., 48:], grad, mask)
    assert of_branch.dtype == dtype and sums.dtype == torch.float32
    for own, theirs in zip((of_branch, sums[:, :1], sums[:, 1].sum(0)), expected, strict=True):
        assert far(own, theirs) < ERRORS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3])
def test_positions_are_turned_and_turned_back(dtype: torch.dtype, heads: int) -> None:
    y, *grads = drawn((2, 50, 3 * 48), *[(2, 50, 48)] * 3, dtype=dtype)
    rope = Rope(*(table.to(DEVICE) for table in rotary_table(50, 16)))
    exact = y.double().requires_grad_()
    query, key, value = (part.unflatten(-1, (3, 16)) for part in exact.chunk(3, dim=-1))
    turned = [*(apply_rope(part, rope, heads) for part in (query, key)), value]
    (expected,) = torch.autograd.grad(turned, exact, [grad.double().unflatten(-1, (3, 16)) for grad in grads])
    assert far(turned_back(*grads, *rope, 8 * heads), expected) < ERRORS[dtype]
    turn_(y, *rope, 8 * heads)
    assert far(y, torch.cat([part.flatten(2) for part in turned], dim=-1)) < ERRORS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_its_gradient(dtype: torch.dtype) -> None:
    x, grad = drawn((3, 50, 48), (3, 50, 48), dtype=dtype)
    x = 2 * x  # into both tails
    exact = x.double().requires_grad_()
    value = F.gelu(exact, approximate="tanh")
    (expected,) = torch.autograd.grad(value, exact, grad.double())
    of_x, out, of_bias = gelu_gradient(x, grad)
    assert of_x.dtype == out.dtype == dtype and of_bias.dtype == torch.float32
    for own, theirs in ((of_x, expected), (out, value), (of_bias, expected.sum((0, 1)))):
        assert far(own, theirs) < ERRORS[dtype]
