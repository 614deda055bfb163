"""Layers of a `StandIn` (gradients.py): gradients of their weights are added to sums, and not handed to autograd.

A linear layer adds them as the product that makes them writes its result, with no gradient in half precision between.
What DiT's blocks do between products is differentiated by kernels.py on a GPU, by PyTorch's own operators elsewhere.

Sums have the dtype of the policy's own weights, float32 as a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from rlhf_mel.f5.backbones.dit import DiTBlock
from rlhf_mel.f5.layers import FeedForward, Rope, SelfAttention, apply_rope, split_heads, zero_padding

SUMMED: set[int] = set()
"""Accumulators touched in this backward pass, by address."""


def add_and_free(total: Tensor, leaf: Any) -> None:
    """For layers that are none of these: what to do with a leaf's gradient as soon as it is there."""
    total.add_(leaf.grad)
    leaf.grad = None
    SUMMED.add(total.data_ptr())


def _kernels() -> Any:
    from rlhf_mel.f5 import kernels

    return kernels


@torch.library.custom_op(
    "rlhf_mel::add_weight_gradient_",
    mutates_args=("total",),
    schema="(Tensor(a!) total, Tensor grad, Tensor x) -> ()",
)
def add_weight_gradient_(
    total: Float[Tensor, "o i"], grad: Float[Tensor, "*rows o"], x: Float[Tensor, "*rows i"]
) -> None:
    """total += sum over all rows of grad^T x, in the dtype of `total`."""
    SUMMED.add(total.data_ptr())
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if grad.dtype == total.dtype:
        total.addmm_(grad.t(), x)
    elif grad.is_cuda:
        torch.addmm(total, grad.t(), x, out_dtype=total.dtype, out=total)
    else:
        total.add_(grad.t() @ x)


@add_weight_gradient_.register_fake
def _(total: Tensor, grad: Tensor, x: Tensor) -> None:
    return None


class _SummedLinear(torch.autograd.Function):
    """F.linear; gradients of weight [O, I] and bias [O] are added to sums of their shapes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, of_weight: Tensor, of_bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, of_weight, of_bias)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, of_weight, of_bias = ctx.saved_tensors
        _add_gradients(grads[0], x, of_weight, of_bias)
        return grads[0] @ weight if ctx.needs_input_grad[0] else None, *[None] * 4


def _add_gradients(grad: Tensor, x: Tensor, of_weight: Tensor, of_bias: Tensor | None) -> None:
    add_weight_gradient_(of_weight, grad, x)
    if of_bias is not None:
        of_bias.add_(grad.flatten(0, -2).sum(0, dtype=of_bias.dtype))


class SummingLinear(nn.Linear):
    """A linear layer that adds the gradients of its weight and bias to `of_weight` and `of_bias`."""

    of_weight: Tensor
    of_bias: Tensor | None

    @staticmethod
    def change(layer: Any, of_weight: Tensor, of_bias: Tensor | None) -> None:
        """Make a plain nn.Linear one of these."""
        layer.of_weight, layer.of_bias = of_weight, of_bias
        layer.__class__ = SummingLinear

    @override
    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        x = x.to(self.weight.dtype)
        out: Tensor = _SummedLinear.apply(x, self.weight, self.bias, self.of_weight, self.of_bias)
        return out


@torch.library.custom_op(
    "rlhf_mel::turned_projections",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor cos, Tensor sin, int turned) -> Tensor",
)
def turned_projections(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """Queries, keys, values [B, T, 3 W] of x, the first two turned by rotary angles in their first `turned` pairs."""
    y = F.linear(x, weight, bias)
    if y.is_cuda:
        _kernels().turn_(y, cos, sin, turned)
        return y
    return torch.cat([*_turned(y.chunk(3, dim=-1)[:2], Rope(cos, sin), turned), y.chunk(3, dim=-1)[2]], dim=-1)


@turned_projections.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


@torch.library.custom_op(
    "rlhf_mel::turned_back",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, int turned) -> Tensor",
)
def turned_back(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """Gradient [B, T, 3 W] of the product in `turned_projections`, of those of its parts [B, T, W]."""
    if query.is_cuda:
        joined: Tensor = _kernels().turned_back(query, key, value, cos, sin, turned)
        return joined
    return torch.cat([*_turned([query, key], Rope(cos, -sin), turned), value], dim=-1)


@turned_back.register_fake
def _(query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], 3 * query.shape[-1]))


def _turned(parts: Sequence[Tensor], rope: Rope, turned: int) -> list[Tensor]:
    half = rope.cos.shape[1]
    return [
        apply_rope(split_heads(part, part.shape[-1] // half // 2), rope, turned // half).flatten(2) for part in parts
    ]


class _TurnedProjections(torch.autograd.Function):
    """`turned_projections` in three; gradients of weight and bias are added to sums of their shapes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        of_weight: Tensor,
        of_bias: Tensor,
        cos: Tensor,
        sin: Tensor,
        turned: int,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, of_weight, of_bias, cos, sin)
        ctx.turned = turned
        return tuple(turned_projections(x, weight, bias, cos, sin, turned).chunk(3, dim=-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, of_weight, of_bias, cos, sin = ctx.saved_tensors
        grad = turned_back(*grads, cos, sin, ctx.turned)
        _add_gradients(grad, x, of_weight, of_bias)
        return grad @ weight if ctx.needs_input_grad[0] else None, *[None] * 7


class SummingAttention(SelfAttention):
    """Attention with one product for queries, keys and values, whose weights' gradients are added to sums."""

    weight: Tensor
    bias: Tensor
    of_weight: Tensor
    of_bias: Tensor

    @staticmethod
    def change(module: Any, of_weight: Tensor, of_bias: Tensor) -> None:
        """Make a SelfAttention one of these; the sums are those of the joined weight and bias."""
        join_projections(module)
        module.weight.requires_grad_()
        module.bias.requires_grad_()
        module.of_weight, module.of_bias = of_weight, of_bias
        module.__class__ = SummingAttention

    @override
    def turned(self, x: Float[Tensor, "b n d"], rope: Rope) -> Sequence[Float[Tensor, "b n h c"]]:
        weights = self.weight, self.bias, self.of_weight, self.of_bias
        pairs = (self.heads if self.pe_attn_head is None else self.pe_attn_head) * rope.cos.shape[1]
        parts: Any = _TurnedProjections.apply(x.to(self.weight.dtype), *weights, rope.cos, rope.sin, pairs)
        return [split_heads(part, self.heads) for part in parts]


@torch.library.custom_op(
    "rlhf_mel::gelu_gradient", mutates_args=(), schema="(Tensor x, Tensor grad) -> (Tensor, Tensor, Tensor)"
)
def gelu_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of gelu(x), tanh form, [B, T, D], what gelu(x) is, and the first's sum over frames, float32 [D]."""
    if x.is_cuda:
        gradients: tuple[Tensor, Tensor, Tensor] = _kernels().gelu_gradient(x, grad)
        return gradients
    of_x = torch.ops.aten.gelu_backward(grad.float(), x.float(), approximate="tanh")
    value = F.gelu(x, approximate="tanh")
    return of_x.to(x.dtype).contiguous(), value.contiguous(), of_x.flatten(0, -2).sum(0)


@gelu_gradient.register_fake
def _(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)


class _SummedFeedForward(torch.autograd.Function):
    """Two layers with GELU between, which runs again for its gradient: else its result would be kept beside its input.

    first, second: weight, bias, and their sums.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *layers: Any) -> Tensor:
        first, second = layers[:4], layers[4:]
        hidden = F.linear(x, *first[:2])
        ctx.save_for_backward(x, hidden, *layers)
        return F.linear(F.gelu(hidden, approximate="tanh"), *second[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, hidden, *layers = ctx.saved_tensors
        (weight, _, of_weight, of_bias), (next_weight, _, of_next_weight, of_next_bias) = layers[:4], layers[4:]
        of_hidden, active, of_bias_now = gelu_gradient(hidden, grads[0] @ next_weight)
        _add_gradients(grads[0], active, of_next_weight, of_next_bias)
        add_weight_gradient_(of_weight, of_hidden, x)
        of_bias.add_(of_bias_now)
        return of_hidden @ weight if ctx.needs_input_grad[0] else None, *[None] * 8


class SummingFeedForward(FeedForward):
    """A feed-forward that keeps its input and the input of GELU alone for its gradient."""

    @staticmethod
    def change(module: Any) -> None:
        """If both layers are plain ones that sum."""
        first, second = module.ff[0][0], module.ff[2]
        if type(first) is type(second) is SummingLinear:
            module.__class__ = SummingFeedForward

    @override
    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        module: Any = self.ff
        layers = [(layer.weight, layer.bias, layer.of_weight, layer.of_bias) for layer in (module[0][0], module[2])]
        out: Tensor = _SummedFeedForward.apply(x.to(layers[0][0].dtype), *layers[0], *layers[1])
        return out


@torch.library.custom_op(
    "rlhf_mel::norm_gradient",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor passed, Tensor of_out, float eps) -> (Tensor, Tensor)",
)
def norm_gradient(x: Tensor, scale: Tensor, passed: Tensor, of_out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`passed` plus the gradient of LN(x) (1 + scale) + shift at x [B, T, D]; those of scale, shift [items, 2, D].

    scale [items, 1, D], of every item or, being one, of all.
    """
    if x.is_cuda:
        gradients: tuple[Tensor, Tensor] = _kernels().norm_gradient(x, scale, passed, of_out, eps)
        return gradients
    value, given, shape = x.float(), of_out.float(), x.shape[-1:]
    normal, mean, rate = torch.native_layer_norm(value, shape, None, None, eps)
    of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        given * (1 + scale.float()), value, shape, mean, rate, None, None, [True, False, False]
    )
    return (passed + of_x).to(x.dtype).contiguous(), _over_rows(len(scale), given * normal, given)


@norm_gradient.register_fake
def _(x: Tensor, scale: Tensor, passed: Tensor, of_out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((len(scale), 2, x.shape[-1]), dtype=torch.float32)


@torch.library.custom_op(
    "rlhf_mel::gate_gradient",
    mutates_args=(),
    schema="(Tensor branch, Tensor gate, Tensor grad, Tensor? mask) -> (Tensor, Tensor)",
)
def gate_gradient(branch: Tensor, gate: Tensor, grad: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient of gate * branch for branch [B, T, D]; [items, 2, D]: that for gate, and the first's sum over frames.

    gate [items, 1, D], of every item or, being one, of all; mask [B, T]: frames that the last sum counts.
    """
    if branch.is_cuda:
        gradients: tuple[Tensor, Tensor] = _kernels().gate_gradient(branch, gate, grad, mask)
        return gradients
    of_branch = grad.float() * gate.float()
    return of_branch.to(branch.dtype).contiguous(), _over_rows(
        len(gate), grad.float() * branch.float(), zero_padding(of_branch, mask)
    )


@gate_gradient.register_fake
def _(branch: Tensor, gate: Tensor, grad: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), branch.new_empty((len(gate), 2, branch.shape[-1]), dtype=torch.float32)


def _over_rows(items: int, *values: Tensor) -> Tensor:
    return torch.stack([value.reshape(items, -1, value.shape[-1]).sum(1) for value in values], dim=1)


class _ModulatedNorm(torch.autograd.Function):
    """x and LN(x) (1 + scale) + shift in `dtype`: together, so that their gradients are one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        normal = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
        return x.view_as(x), (normal * (1 + scale) + shift).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        of_x, sums = norm_gradient(x, scale, *grads, ctx.eps)
        of_scale, of_shift = sums.to(scale.dtype).unsqueeze(2).unbind(1)
        return of_x, of_scale, of_shift, None, None


class _Gated(torch.autograd.Function):
    """x + gate branch; the gradient of the bias that was added in branch, where mask is True, goes to its sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, of_bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(branch, gate, of_bias, mask)
        return x + gate * branch

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        branch, gate, of_bias, mask = ctx.saved_tensors
        of_branch, sums = gate_gradient(branch, gate, grads[0], mask)
        if of_bias is not None:
            of_bias.add_(sums[:, 1].sum(0))
        return grads[0], of_branch, sums[:, 0].to(gate.dtype).unsqueeze(1), None, None


class SummingBlock(DiTBlock):
    """The gradients of its two biases before the gates are summed where those of the gates are."""

    dtype: torch.dtype
    of_biases: Sequence[Tensor | None]

    @staticmethod
    def change(block: Any) -> None:
        """Make a DiTBlock one of these, after the layers in it that become summing ones."""
        outputs = block.attn.to_out[0], block.ff.ff[2]
        block.dtype = block.ff.ff[0][0].weight.dtype
        block.of_biases = [getattr(layer, "of_bias", None) for layer in outputs]
        for layer in outputs:
            if isinstance(layer, SummingLinear):
                layer.of_bias = None
        block.__class__ = SummingBlock

    @override
    def forward(
        self, x: Tensor, time_embedding: Tensor, mask: Tensor | None, rope: Rope, exact: bool = False
    ) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.attn_norm.modulation(time_embedding)
        of_attention, of_feed_forward = self.of_biases
        norms: Any = [(norm.eps, self.dtype) for norm in (self.attn_norm.norm, self.ff_norm)]
        x, hidden = _ModulatedNorm.apply(x, scale, shift, *norms[0])
        x = _Gated.apply(x, self.attn(hidden, mask, rope, exact), gate, of_attention, mask)
        x, hidden = _ModulatedNorm.apply(x, mlp_scale, mlp_shift, *norms[1])
        x = _Gated.apply(x, self.ff(hidden), mlp_gate, of_feed_forward, None)
        return x


def join_projections(module: Any) -> None:
    """Weights and biases of queries, keys and values become parts of `module.weight` and `module.bias`."""
    for name in ("weight", "bias"):
        parts = [getattr(projection, name) for projection in (module.to_q, module.to_k, module.to_v)]
        whole = side_by_side([part.detach() for part in parts])
        for part, rows in zip(parts, whole.chunk(3), strict=True):
            part.data = rows
        module.register_buffer(name, whole, persistent=False)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Concatenated; where they are already parts of one tensor, one after the other, in its memory."""
    first, memory = parts[0], {part.untyped_storage().data_ptr() for part in parts}
    starts = [part.storage_offset() - k * first.numel() for k, part in enumerate(parts)]
    if len(memory) == len(set(starts)) == 1:
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    return torch.cat(list(parts))
