"""The convolution of kernels.py beside PyTorch's; without a GPU by Triton's interpreter (conftest.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_mel.kernels import convolved, grouped_convolution, packed, takes

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
