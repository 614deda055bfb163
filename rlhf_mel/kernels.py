"""A convolution over time that GPU libraries are slow at: few wide groups, many taps, half precision.

ConvPositionEmbedding has 16 groups of 64 channels and 31 taps, twice a velocity; cuDNN runs it group by group, at a
tenth of the rate of a product of matrices. Here it is a sum of products, a tap each, in one Triton kernel that keeps
the sum in float32: docs/benchmarks.md has what that buys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

CHANNELS = (16, 32, 64, 128)
"""Channels of a group that the kernel takes."""


@triton.jit
def _sum_over_taps(
    x, weight, bias, out, frames, WIDTH: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """out[b, t, g, :] = bias[g] + sum_k x[b, t + k - TAPS // 2, g, :] @ weight[k, :, g], BLOCK frames of an item."""
    group, item = tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, C)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = item.to(tl.int64) * frames * WIDTH + group * C
    matrix = weight + group * C + channels[:, None] * WIDTH + channels[None, :]
    total = tl.zeros((BLOCK, C), dtype=tl.float32)
    for k in range(TAPS):
        source = t + k - TAPS // 2
        inside = (source >= 0) & (source < frames)
        heard = tl.load(x + here + source[:, None] * WIDTH + channels[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(heard, tl.load(matrix + k * C * WIDTH), total)
    total += tl.load(bias + group * C + channels).to(tl.float32)[None, :]
    target = out + here + t[:, None] * WIDTH + channels[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(t < frames)[:, None])


def takes(convolution: nn.Conv1d) -> bool:
    """Whether the kernel can compute it."""
    channels, taps = convolution.weight.shape[1:]
    square = convolution.in_channels == convolution.out_channels == channels * convolution.groups
    same = convolution.padding == (taps // 2,) and convolution.stride == convolution.dilation == (1,)
    return square and same and taps % 2 == 1 and channels in CHANNELS and convolution.bias is not None


def packed(weight: Tensor) -> Tensor:
    """Weight [G C, C, taps] of a convolution as `convolved` reads it, [taps, C, G C]."""
    return weight.permute(2, 1, 0).contiguous()


def convolved(x: Tensor, matrices: Tensor, bias: Tensor) -> Tensor:
    """Convolution of x [B, T, G C] over T with the packed weight and bias [G C], the length kept; all of one dtype."""
    x = x.contiguous()
    batch, frames, width = x.shape
    taps, channels, _ = matrices.shape
    out = torch.empty_like(x)
    block = 128
    grid = (triton.cdiv(frames, block), width // channels, batch)
    _sum_over_taps[grid](x, matrices, bias, out, frames, width, taps, channels, block, num_warps=4, num_stages=4)
    return out


@torch.library.custom_op(
    "rlhf_mel::grouped_convolution", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor"
)
def grouped_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same with the convolution's own weight [G C, C, taps], and with gradients."""
    return convolved(x, packed(weight), bias)


@grouped_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_x = grad_weight = grad_bias = None
    channels, taps = weight.shape[1:]
    if needs_x:  # a convolution too: taps from last to first, inputs and outputs of a group exchanged
        by_group = weight.unflatten(0, (-1, channels)).permute(3, 1, 0, 2).flip(0)
        grad_x = convolved(grad, by_group.flatten(2).contiguous(), grad.new_zeros(grad.shape[2]))
    if needs_weight:
        image, heard = (value.transpose(1, 2).unsqueeze(2) for value in (grad, x))  # channels last, as they lie
        weight = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        _, found, _ = torch.ops.aten.convolution_backward(
            image,
            heard,
            weight,
            None,
            [1, 1],
            [0, taps // 2],
            [1, 1],
            False,
            [0, 0],
            weight.shape[0] // channels,
            [False, True, False],
        )
        grad_weight = found.squeeze(2)
    if needs_bias:
        grad_bias = grad.sum((0, 1), dtype=torch.float32).to(grad.dtype)
    return grad_x, grad_weight, grad_bias


grouped_convolution.register_autograd(_backward, setup_context=_setup)
