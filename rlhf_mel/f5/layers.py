"""Layers shared by the backbones. Attribute names are those of F5-TTS, so its checkpoints load unchanged.

References: DiT and AdaLN-zero, Peebles & Xie 2023 (arXiv:2212.09748); rotary positions, Su et al. 2021
(arXiv:2104.09864), interleaved pairs as in GPT-J; ConvNeXt V2 and its response norm, Woo et al. 2023
(arXiv:2301.00808); convolutional positions, Baevski et al. 2020 (arXiv:2006.11477); the assembly is F5-TTS,
Chen et al. 2024 (arXiv:2410.06885).

Shapes: B batch, T frames, D width, H heads. Where a time embedding is [1, D], one row serves the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rope(NamedTuple):
    """Cosines and sines of the rotary angles, float32 [T, dim_head / 2]."""

    cos: Tensor
    sin: Tensor


def rotary_frequencies(dim_head: int, theta: float = 10_000.0, device: torch.device | None = None) -> Tensor:
    """theta^(-2i / dim_head), float32 [dim_head / 2]."""
    return 1.0 / theta ** (torch.arange(0, dim_head, 2, device=device).float() / dim_head)


def rotary_table(length_frames: int, dim_head: int, device: torch.device | None = None) -> Rope:
    """Angles of positions 0..T-1. Never read from a buffer: half precision would be off by up to a radian."""
    positions = torch.arange(length_frames, device=device).float()
    angles = torch.outer(positions, rotary_frequencies(dim_head, device=device))
    return Rope(angles.cos(), angles.sin())


def apply_rope(x: Tensor, rope: Rope, heads: int | None = None) -> Tensor:
    """Rotate adjacent pairs of x [B, T, H, dim_head], in all heads or the first `heads`; at least float32."""
    rotated = x if heads is None else x[:, :, :heads]
    even, odd = rotated.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.cos.unsqueeze(1), rope.sin.unsqueeze(1)
    # a half-precision product with the float32 table is float32, under autocast too
    pairs = (even * cos - odd * sin, odd * cos + even * sin)
    turned = torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype)
    return turned if heads is None else torch.cat((turned, x[:, :, heads:]), dim=2)


def position_table(length_frames: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Absolute positions [T, dim], float32: cat(cos, sin) of position times rotary frequency."""
    rope = rotary_table(length_frames, dim, device)
    return torch.cat((rope.cos, rope.sin), dim=-1)


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, T, D] with zeros where mask [B, T] is False."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


class TimestepEmbedding(nn.Module):
    """Flow time in [0, 1] to [B, D]: sinusoids of 1000 t, then a two-layer perceptron."""

    def __init__(self, dim: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.time_mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, time: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        half = self.frequencies // 2
        exponents = torch.arange(half, device=time.device).float() * -(math.log(10_000) / (half - 1))
        # 1000 t in half precision would be wrong by up to half a radian
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        angles = (1000 * time).unsqueeze(1) * exponents.exp()
        return self.time_mlp(torch.cat((angles.sin(), angles.cos()), dim=-1).to(dtype or time.dtype))


class GlobalResponseNorm(nn.Module):
    """gamma x N(x) + beta + x with N the L2 norm of a channel over time, relative to the mean channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        relative = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * relative) + self.beta + x


class ConvNeXtV2Block(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden_dim)
        self.grn = GlobalResponseNorm(hidden_dim)
        self.pwconv2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dwconv(x.transpose(1, 2)).transpose(1, 2)
        hidden = self.grn(F.gelu(self.pwconv1(self.norm(hidden))))
        return x + self.pwconv2(hidden)


class ConvPositionEmbedding(nn.Module):
    """Two wide grouped convolutions over time; padding is silenced before each, so it never leaks in."""

    def __init__(self, dim: int, kernel_size: int = 31, groups: int = 16):
        super().__init__()
        convolutions = [nn.Conv1d(dim, dim, kernel_size, groups=groups, padding=kernel_size // 2) for _ in range(2)]
        self.conv1d = nn.Sequential(convolutions[0], nn.Mish(), convolutions[1], nn.Mish())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        layers: Any = self.conv1d
        for convolution in (layers[0], layers[2]):
            x = F.mish(self.convolve(convolution, zero_padding(x, mask)))
        return zero_padding(x, mask)  # Mish(0) = 0: before or after is one

    def convolve(self, convolution: Any, x: Tensor) -> Tensor:
        """The same over x [B, T, D]; in half precision on a GPU by a kernel of kernels.py."""
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        if x.is_cuda and dtype in (torch.bfloat16, torch.float16):
            from rlhf_mel.f5 import kernels

            if kernels.takes(convolution):
                weight, bias = convolution.weight.to(dtype), convolution.bias.to(dtype)
                return kernels.grouped_convolution(x.to(dtype), weight, bias)
        return convolution(x.transpose(1, 2)).transpose(1, 2)


class AdaLayerNorm(nn.Module):
    """Time sets shift, scale and gate of attention, then of the feed-forward: (1 + scale) LN(x) + shift."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim * 6)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def modulation(self, time_embedding: Tensor) -> Sequence[Tensor]:
        """Shift, scale, gate of attention, the same of the feed-forward [B or 1, 1, D]."""
        return self.linear(F.silu(time_embedding)).unsqueeze(1).chunk(6, dim=-1)

    def forward(self, x: Tensor, time_embedding: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(time_embedding)
        return self.norm(x) * (1 + scale) + shift, gate, mlp_shift, mlp_scale, mlp_gate


class AdaLayerNormFinal(nn.Module):
    """(1 + scale) LN(x) + shift; scale comes first here, unlike in AdaLayerNorm."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim * 2)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(time_embedding)).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class DirectionNorm(nn.Module):
    """sqrt(D) g x / |x|: RMSNorm without an epsilon, its gain named `g` (x-transformers', in E2-TTS)."""

    def __init__(self, dim: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.g


class FeedForward(nn.Module):
    def __init__(self, dim: int, mult: float = 4, dropout: float = 0.0):
        super().__init__()
        hidden = int(dim * mult)
        project_in = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"))
        self.ff = nn.Sequential(project_in, nn.Dropout(dropout), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class SelfAttention(nn.Module):
    """Attention over frames with rotary positions.

    With `attn_mask_enabled` False (every released F5-TTS model) padded frames are attended to: only batches
    of one duration give each item what it gives alone.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        qk_norm: str | None = None,
        pe_attn_head: int | None = None,
        attn_mask_enabled: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.pe_attn_head = pe_attn_head
        self.attn_mask_enabled = attn_mask_enabled
        self.to_q = nn.Linear(dim, heads * dim_head)
        self.to_k = nn.Linear(dim, heads * dim_head)
        self.to_v = nn.Linear(dim, heads * dim_head)
        self.q_norm = _head_norm(qk_norm, dim_head)
        self.k_norm = _head_norm(qk_norm, dim_head)
        self.to_out = nn.ModuleList([nn.Linear(heads * dim_head, dim), nn.Dropout(dropout)])

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys, values [B, T, heads * dim_head]."""
        return self.to_q(x), self.to_k(x), self.to_v(x)

    def turned(self, x: Tensor, rope: Rope) -> Sequence[Tensor]:
        """Queries and keys, normed and at their positions, and values [B, T, heads, dim_head]."""
        query, key, value = (split_heads(projected, self.heads) for projected in self.project(x))
        query = apply_rope(norm_heads(query, self.q_norm), rope, self.pe_attn_head)
        key = apply_rope(norm_heads(key, self.k_norm), rope, self.pe_attn_head)
        return query, key, value

    def forward(self, x: Tensor, mask: Tensor | None, rope: Rope) -> Tensor:
        query, key, value = self.turned(x, rope)
        attended = mask[:, None, None, :] if self.attn_mask_enabled and mask is not None else None
        x = attention(query, key, value, attended)
        project_out, dropout = self.to_out
        return zero_padding(dropout(project_out(x)), mask)


class JointAttention(nn.Module):
    """Attention of audio frames and text tokens together, each with projections of its own (MM-DiT).

    Esser et al. 2024 (arXiv:2403.03206). Rotary positions count from 0 in both. In the `last` block the text is
    read and not written.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        qk_norm: str | None = None,
        attn_mask_enabled: bool = False,
        last: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.attn_mask_enabled = attn_mask_enabled
        for name in ("to_q", "to_k", "to_v", "to_q_c", "to_k_c", "to_v_c"):
            setattr(self, name, nn.Linear(dim, heads * dim_head))
        for name in ("q_norm", "k_norm", "c_q_norm", "c_k_norm"):
            setattr(self, name, _head_norm(qk_norm, dim_head))
        self.to_out = nn.ModuleList([nn.Linear(heads * dim_head, dim), nn.Dropout(dropout)])
        self.to_out_c = None if last else nn.Linear(heads * dim_head, dim)

    def forward(
        self, x: Tensor, text: Tensor, mask: Tensor | None, text_mask: Tensor, rope: Rope, text_rope: Rope
    ) -> tuple[Tensor, Tensor | None]:
        """What audio x [B, T, D] and text [B, N, D] take in; None for a text that no one reads any more."""
        audio = self._heads(x, (self.to_q, self.to_k, self.to_v), (self.q_norm, self.k_norm), rope)
        words = self._heads(text, (self.to_q_c, self.to_k_c, self.to_v_c), (self.c_q_norm, self.c_k_norm), text_rope)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(audio, words, strict=True))
        attended = None
        if self.attn_mask_enabled and mask is not None:
            attended = torch.cat((mask, text_mask), dim=1)[:, None, None, :]
        taken = attention(query, key, value, attended)
        project_out, dropout = self.to_out
        heard = zero_padding(dropout(project_out(taken[:, : x.shape[1]])), mask)
        if self.to_out_c is None:
            return heard, None
        return heard, zero_padding(self.to_out_c(taken[:, x.shape[1] :]), text_mask)

    def _heads(self, x: Tensor, projections: Any, norms: Any, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split_heads(project(x), self.heads) for project in projections)
        query, key = (apply_rope(norm_heads(x, norm), rope) for x, norm in zip((query, key), norms, strict=True))
        return query, key, value


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * dim_head] to [B, T, heads, dim_head]."""
    return x.unflatten(-1, (heads, -1))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of [B, T, heads, dim_head], which kernels read without a copy; [B, T, heads * dim_head]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def norm_heads(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """x normed in the dtype of the norm's weights (under autocast these stay float32), returned in its own."""
    return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)


def _head_norm(qk_norm: str | None, dim_head: int) -> nn.RMSNorm | None:
    if qk_norm not in (None, "rms_norm"):
        raise ValueError(f"qk_norm: expected None or 'rms_norm', got {qk_norm!r}")
    return nn.RMSNorm(dim_head, eps=1e-6) if qk_norm else None
