"""Triton kernels, where libraries and compiler are slow: docs/benchmarks.md has what each buys.

Convolution over time: ConvPositionEmbedding has 16 groups of 64 channels and 31 taps, twice a velocity; cuDNN runs it
group by group, at a tenth of the rate of a product of matrices. Here it is a sum of products, a tap each.

Gradients of a block (weight_gradients.py): of a modulated norm, a gated branch and GELU each number is read once, and
what is summed over frames is summed there, a part a program; rotary positions are turned back as the gradients of
queries, keys and values are laid side by side for the product that follows.

Sums are kept in float32 whatever the dtype of what is summed.
"""

# Triton has no types, and its kernels take pointers and numbers that it alone understands:
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
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
        values = tl.load(x + here + source[:, None] * WIDTH + channels[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(values, tl.load(matrix + k * C * WIDTH), total)
    total += tl.load(bias + group * C + channels).to(tl.float32)[None, :]
    target = out + here + t[:, None] * WIDTH + channels[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(t < frames)[:, None])


def takes(convolution: nn.Conv1d) -> bool:
    """Whether the kernel can compute it."""
    channels, taps = convolution.weight.shape[1:]
    square = convolution.in_channels == convolution.out_channels == channels * convolution.groups
    same = convolution.padding == (taps // 2,) and convolution.stride == convolution.dilation == (1,)
    return square and same and taps % 2 == 1 and channels in CHANNELS and convolution.bias is not None


def packed(weight: Float[Tensor, "w c taps"]) -> Float[Tensor, "taps c w"]:
    """Weight of a convolution of w channels in groups of c, as `convolved` reads it."""
    return weight.permute(2, 1, 0).contiguous()


def convolved(
    x: Float[Tensor, "b n w"], matrices: Float[Tensor, "taps c w"], bias: Float[Tensor, " w"]
) -> Float[Tensor, "b n w"]:
    """Convolution of x over time with the packed weight and the bias, the length kept; all of one dtype."""
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
def grouped_convolution(
    x: Float[Tensor, "b n w"], weight: Float[Tensor, "w c taps"], bias: Float[Tensor, " w"]
) -> Float[Tensor, "b n w"]:
    """The same with the convolution's own weight, and with gradients."""
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
        grad_image, x_image = (value.transpose(1, 2).unsqueeze(2) for value in (grad, x))  # channels last, as they lie
        weight = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        _, weight_image, _ = torch.ops.aten.convolution_backward(
            grad_image,
            x_image,
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
        grad_weight = weight_image.squeeze(2)
    if needs_bias:
        grad_bias = grad.sum((0, 1), dtype=torch.float32).to(grad.dtype)
    return grad_x, grad_weight, grad_bias


grouped_convolution.register_autograd(_backward, setup_context=_setup)


PROGRAMS, ROWS = 528, 2
"""Parts that a sum over rows has, four for each multiprocessor of an H100, and rows that a program reads at a time."""


@triton.jit
def _norm_gradient(
    x, scale, passed, of_out, of_x, parts, rows, scale_step, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """of_x = passed + gradient of LN(x) (1 + scale) + shift at x; a program's part of those of scale and shift."""
    item, column = tl.program_id(1), tl.arange(0, WIDTH)
    known = column < D
    factor = 1 + tl.load(scale + item * scale_step + column, mask=known, other=0.0).to(tl.float32)[None, :]
    of_scale = tl.zeros((WIDTH,), dtype=tl.float32)
    of_shift = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & known[None, :]
        at = (item.to(tl.int64) * rows + row)[:, None] * D + column[None, :]
        value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        given = tl.load(of_out + at, mask=here, other=0.0).to(tl.float32)
        gradient = tl.load(passed + at, mask=here, other=0.0).to(tl.float32)
        centered = tl.where(here, value - tl.sum(value, axis=1)[:, None] / D, 0.0)
        rate = tl.rsqrt(tl.sum(centered * centered, axis=1)[:, None] / D + eps)
        normal = centered * rate
        of_scale += tl.sum(given * normal, axis=0)
        of_shift += tl.sum(given, axis=0)
        inner = given * factor
        along = tl.sum(inner * normal, axis=1)[:, None] / D
        gradient += rate * (inner - tl.sum(inner, axis=1)[:, None] / D - normal * along)
        tl.store(of_x + at, gradient.to(of_x.dtype.element_ty), mask=here)
    part = parts + (item * tl.num_programs(0) + tl.program_id(0)) * 2 * D + column
    tl.store(part, of_scale, mask=known)
    tl.store(part + D, of_shift, mask=known)


@triton.jit
def _gate_gradient(
    branch, gate, grad, kept, of_branch, parts, rows, gate_step,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradient of gate * branch with respect to branch; a program's part of that of gate, and the first's row sum."""
    item, column = tl.program_id(1), tl.arange(0, WIDTH)
    known = column < D
    opened = tl.load(gate + item * gate_step + column, mask=known, other=0.0).to(tl.float32)[None, :]
    of_gate = tl.zeros((WIDTH,), dtype=tl.float32)
    of_bias = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & known[None, :]
        first = item.to(tl.int64) * rows + row
        at = first[:, None] * D + column[None, :]
        given = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        of_gate += tl.sum(given * tl.load(branch + at, mask=here, other=0.0).to(tl.float32), axis=0)
        gradient = given * opened
        tl.store(of_branch + at, gradient.to(of_branch.dtype.element_ty), mask=here)
        if MASKED:
            gradient = gradient * tl.load(kept + first, mask=row < rows, other=0).to(tl.float32)[:, None]
        of_bias += tl.sum(gradient, axis=0)
    part = parts + (item * tl.num_programs(0) + tl.program_id(0)) * 2 * D + column
    tl.store(part, of_gate, mask=known)
    tl.store(part + D, of_bias, mask=known)


@triton.jit
def _sum_of_parts(parts, total, count, width, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """total [items, width] of parts [items, count, width]."""
    part, column = tl.arange(0, COUNT), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    item = tl.program_id(1)
    inside = (part < count)[:, None] & (column < width)[None, :]
    values = tl.load(parts + (item * count + part)[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(total + item * width + column, tl.sum(values, axis=0), mask=column < width)


@triton.jit
def _gelu_gradient(x, grad, of_x, out, parts, rows, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Gradient of gelu(x), tanh form, and gelu(x) once more; a program's part of the first's sum over rows."""
    column = tl.arange(0, WIDTH)
    known = column < D
    of_bias = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & known[None, :]
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        given = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        square = value * value  # gelu(x) = x s(x), s = sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
        share = tl.sigmoid(1.5957691216057308 * value * (1 + 0.044715 * square))
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
        gradient = given * share * (1 + value * (1 - share) * slope)
        of_bias += tl.sum(gradient, axis=0)
        tl.store(of_x + at, gradient.to(of_x.dtype.element_ty), mask=here)
        tl.store(out + at, (value * share).to(out.dtype.element_ty), mask=here)
    tl.store(parts + tl.program_id(0) * D + column, of_bias, mask=known)


def _summed(x: Tensor, items: int, count: int, run: Callable[[tuple[int, int], Tensor, int, int], Any]) -> Tensor:
    """Float32 [items, count, D]: sums over the rows of each item of x, by `run` of (grid, parts, rows, D)."""
    width = x.shape[-1]
    rows = x.numel() // width // items
    programs = min(PROGRAMS // items + 1, triton.cdiv(rows, ROWS))
    parts = x.new_empty(items, programs, count, width, dtype=torch.float32)
    run((programs, items), parts, rows, width)
    total = x.new_empty(items, count, width, dtype=torch.float32)
    grid = (triton.cdiv(count * width, 16), items)
    _sum_of_parts[grid](parts, total, programs, count * width, triton.next_power_of_2(programs), 16, num_warps=8)
    return total


def norm_gradient(
    x: Float[Tensor, "b n d"],
    scale: Float[Tensor, "items 1 d"],
    passed: Float[Tensor, "b n d"],
    of_out: Float[Tensor, "b n d"],
    eps: float,
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "items 2 d"]]:
    """`passed` plus the gradient of LN(x) (1 + scale) + shift at x; then those of scale and of shift, float32.

    Args:
        of_out: gradient of the result.
        scale: of every item or, being one, of all.
    """
    x, passed, of_out = x.contiguous(), passed.contiguous(), of_out.contiguous()
    of_x = torch.empty_like(x)

    def run(grid: tuple[int, int], parts: Tensor, rows: int, width: int) -> None:
        block = triton.next_power_of_2(width)
        _norm_gradient[grid](
            x, scale, passed, of_out, of_x, parts, rows, scale.stride(0), eps, width, block, ROWS, num_warps=4
        )

    return of_x, _summed(x, len(scale), 2, run)


def gate_gradient(
    branch: Float[Tensor, "b n d"],
    gate: Float[Tensor, "items 1 d"],
    grad: Float[Tensor, "b n d"],
    mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "items 2 d"]]:
    """Gradient of gate * branch with respect to branch; then that of gate and the first's sum over frames, float32.

    Args:
        gate: of every item or, being one, of all.
        mask: frames that the last sum counts.
    """
    branch, grad = branch.contiguous(), grad.contiguous()
    of_branch = torch.empty_like(branch)
    kept = None if mask is None else mask.contiguous()

    def run(grid: tuple[int, int], parts: Tensor, rows: int, width: int) -> None:
        block = triton.next_power_of_2(width)
        _gate_gradient[grid](
            branch, gate, grad, kept, of_branch, parts, rows, gate.stride(0), width, block, ROWS, kept is not None,
            num_warps=4,
        )  # fmt: skip

    return of_branch, _summed(branch, len(gate), 2, run)


def gelu_gradient(
    x: Float[Tensor, "b n d"], grad: Float[Tensor, "b n d"]
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"], Float[Tensor, " d"]]:
    """Gradient of gelu(x), tanh form; gelu(x) itself; the first's sum over frames, float32."""
    x, grad = x.contiguous(), grad.contiguous()
    of_x, out = torch.empty_like(x), torch.empty_like(x)

    def run(grid: tuple[int, int], parts: Tensor, rows: int, width: int) -> None:
        block = triton.next_power_of_2(width)
        _gelu_gradient[grid](x, grad, of_x, out, parts, rows, width, block, ROWS, num_warps=8)

    return of_x, out, _summed(x, 1, 1, run)[0, 0]


@triton.jit
def _turned(at, cos, sin, pair, known, turned, SIGN: tl.constexpr, HALF: tl.constexpr):
    """Where the pairs of numbers at `at` lie, and these, the first `turned` turned by SIGN times their angles."""
    offset = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
    even, odd = tl.split(tl.load(at + offset, mask=known[:, None], other=0.0).to(tl.float32))
    angle, inside = pair % HALF, known & (pair < turned)
    c = tl.load(cos + angle, mask=inside, other=1.0)
    s = SIGN * tl.load(sin + angle, mask=inside, other=0.0)
    return offset, tl.join(even * c - odd * s, odd * c + even * s)


@triton.jit
def _turn(y, cos, sin, frames, turned, W: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Queries and keys, the first two thirds of a row [3 W], in place."""
    row, pair = tl.program_id(0), tl.arange(0, BLOCK)
    known = pair < W // 2
    angles = (row % frames) * HALF
    for part in range(2):
        at = y + row.to(tl.int64) * 3 * W + part * W
        offset, pairs = _turned(at, cos + angles, sin + angles, pair, known, turned, 1, HALF)
        tl.store(at + offset, pairs.to(y.dtype.element_ty), mask=known[:, None])


@triton.jit
def _turn_back(
    query, key, value, cos, sin, out, frames, turned, W: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row [3 W] of three rows [W], two of them turned back."""
    row, pair = tl.program_id(0), tl.arange(0, BLOCK)
    known = pair < W // 2
    angles = (row % frames) * HALF
    source, target = row.to(tl.int64) * W, out + row.to(tl.int64) * 3 * W
    offset, pairs = _turned(query + source, cos + angles, sin + angles, pair, known, turned, -1, HALF)
    tl.store(target + offset, pairs.to(out.dtype.element_ty), mask=known[:, None])
    offset, pairs = _turned(key + source, cos + angles, sin + angles, pair, known, turned, -1, HALF)
    tl.store(target + W + offset, pairs.to(out.dtype.element_ty), mask=known[:, None])
    tl.store(target + 2 * W + offset, tl.load(value + source + offset, mask=known[:, None]), mask=known[:, None])


def turn_(y: Float[Tensor, "b n w3"], cos: Float[Tensor, "n c"], sin: Float[Tensor, "n c"], turned: int) -> None:
    """Rotate, in place, pairs of queries and keys in y, in each the first `turned`, by the angles of each frame."""
    batch, frames, width = y.shape[0], y.shape[1], y.shape[2] // 3
    block = triton.next_power_of_2(width // 2)
    _turn[(batch * frames,)](y, cos, sin, frames, turned, width, cos.shape[1], block, num_warps=4)


def turned_back(
    query: Float[Tensor, "b n w"],
    key: Float[Tensor, "b n w"],
    value: Float[Tensor, "b n w"],
    cos: Float[Tensor, "n c"],
    sin: Float[Tensor, "n c"],
    turned: int,
) -> Float[Tensor, "b n 3*w"]:
    """The gradient of y before `turn_`, of gradients of its three parts after it."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, frames, width = query.shape
    out = query.new_empty(batch, frames, 3 * width)
    block = triton.next_power_of_2(width // 2)
    _turn_back[(batch * frames,)](
        query, key, value, cos, sin, out, frames, turned, width, cos.shape[1], block, num_warps=4
    )
    return out
