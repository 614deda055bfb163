"""Layers shared by the backbones. Attribute names are those of F5-TTS, so its checkpoints load unchanged.

References: DiT and AdaLN-zero, Peebles & Xie 2023 (arXiv:2212.09748); rotary positions, Su et al. 2021
(arXiv:2104.09864), interleaved pairs as in GPT-J; ConvNeXt V2 and its response norm, Woo et al. 2023
(arXiv:2301.00808); convolutional positions, Baevski et al. 2020 (arXiv:2006.11477); the assembly is F5-TTS,
Chen et al. 2024 (arXiv:2410.06885).

Shapes: b batch, n frames, t text tokens, d width, h heads, c width of a head. Where a time embedding is [1, d], one row
serves the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override


class Rope(NamedTuple):
    """Cosines and sines of the rotary angles, float32; c is half the width of a head."""

    cos: Float[Tensor, "n c"]
    sin: Float[Tensor, "n c"]


def rotary_frequencies(
    dim_head: int, theta: float = 10_000.0, device: torch.device | None = None
) -> Float[Tensor, " c"]:
    """theta^(-2i / dim_head), float32 [dim_head / 2]."""
    return 1.0 / theta ** (torch.arange(0, dim_head, 2, device=device).float() / dim_head)


def rotary_table(length_frames: int, dim_head: int, device: torch.device | None = None) -> Rope:
    """Angles of positions 0..T-1. Never read from a buffer: half precision would be off by up to a radian."""
    positions = torch.arange(length_frames, device=device).float()
    angles = torch.outer(positions, rotary_frequencies(dim_head, device=device))
    return Rope(angles.cos(), angles.sin())


def apply_rope(x: Float[Tensor, "b n h c"], rope: Rope, heads: int | None = None) -> Float[Tensor, "b n h c"]:
    """Rotate adjacent pairs of channels, in all heads or the first `heads`; computed in at least float32."""
    rotated = x if heads is None else x[:, :, :heads]
    even, odd = torch.unflatten(rotated, -1, (-1, 2)).unbind(-1)
    cos, sin = rope.cos.unsqueeze(1), rope.sin.unsqueeze(1)
    # a half-precision product with the float32 table is float32, under autocast too
    pairs = (even * cos - odd * sin, odd * cos + even * sin)
    turned = torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype)
    return turned if heads is None else torch.cat((turned, x[:, :, heads:]), dim=2)


def position_table(length_frames: int, dim: int, device: torch.device | None = None) -> Float[Tensor, "n d"]:
    """Absolute positions, float32: cat(cos, sin) of position times rotary frequency."""
    rope = rotary_table(length_frames, dim, device)
    return torch.cat((rope.cos, rope.sin), dim=-1)


def zero_padding(x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n d"]:
    """x with zeros where `mask` is False."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


class TimestepEmbedding(nn.Module):
    """Flow time in [0, 1] to a vector: sinusoids of 1000 t, then a two-layer perceptron."""

    def __init__(self, dim: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.time_mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    @override
    def forward(self, time: Float[Tensor, " b"], dtype: torch.dtype | None = None) -> Float[Tensor, "b d"]:
        half = self.frequencies // 2
        exponents = torch.arange(half, device=time.device).float() * -(math.log(10_000) / (half - 1))
        # 1000 t in half precision would be wrong by up to half a radian
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        angles = (1000 * time).unsqueeze(1) * exponents.exp()
        embedding: Tensor = self.time_mlp(torch.cat((angles.sin(), angles.cos()), dim=-1).to(dtype or time.dtype))
        return embedding


class GlobalResponseNorm(nn.Module):
    """gamma x N(x) + beta + x with N the L2 norm of a channel over time, relative to the mean channel (ConvNeXt V2)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim))

    @override
    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        relative = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        normed: Tensor = self.gamma * (x * relative) + self.beta + x
        return normed


class ConvNeXtV2Block(nn.Module):
    """Convolution over time channel by channel, then a two-layer perceptron with a response norm; residual."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden_dim)
        self.grn = GlobalResponseNorm(hidden_dim)
        self.pwconv2 = nn.Linear(hidden_dim, dim)

    @override
    def forward(self, x: Float[Tensor, "b n d"], inside: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """`inside`: frames that count in the response norm; None: all."""
        hidden = self.dwconv(x.transpose(1, 2)).transpose(1, 2)
        hidden = self.grn(zero_padding(F.gelu(self.pwconv1(self.norm(hidden))), inside))
        out: Tensor = x + self.pwconv2(hidden)
        return out


class ConvPositionEmbedding(nn.Module):
    """Two wide grouped convolutions over time; padding is silenced before each, so it never leaks in."""

    def __init__(self, dim: int, kernel_size: int = 31, groups: int = 16):
        super().__init__()
        convolutions = [nn.Conv1d(dim, dim, kernel_size, groups=groups, padding=kernel_size // 2) for _ in range(2)]
        self.conv1d = nn.Sequential(convolutions[0], nn.Mish(), convolutions[1], nn.Mish())

    @override
    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        layers: Any = self.conv1d
        for convolution in (layers[0], layers[2]):
            x = F.mish(self.convolve(convolution, zero_padding(x, mask)))
        return zero_padding(x, mask)  # Mish(0) = 0: before or after is one

    def convolve(self, convolution: Any, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """`convolution` over time; in half precision on a GPU by a kernel of kernels.py."""
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        if x.is_cuda and dtype in (torch.bfloat16, torch.float16):
            from rlhf_mel.f5 import kernels

            if kernels.takes(convolution):
                weight, bias = convolution.weight.to(dtype), convolution.bias.to(dtype)
                convolved: Tensor = kernels.grouped_convolution(x.to(dtype), weight, bias)
                return convolved
        channels_first: Tensor = convolution(x.transpose(1, 2))
        return channels_first.transpose(1, 2)


class AdaLayerNorm(nn.Module):
    """Time sets shift, scale and gate of attention, then of the feed-forward: (1 + scale) LN(x) + shift."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim * 6)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def modulation(self, time_embedding: Float[Tensor, "#b d"]) -> Sequence[Float[Tensor, "#b 1 d"]]:
        """Shift, scale, gate of attention, then the same of the feed-forward."""
        modulation: Tensor = self.linear(F.silu(time_embedding))
        return modulation.unsqueeze(1).chunk(6, dim=-1)

    @override
    def forward(
        self, x: Float[Tensor, "b n d"], time_embedding: Float[Tensor, "#b d"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x normed for attention; its gate; shift, scale and gate of the feed-forward."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(time_embedding)
        return self.norm(x) * (1 + scale) + shift, gate, mlp_shift, mlp_scale, mlp_gate


class AdaLayerNormFinal(nn.Module):
    """(1 + scale) LN(x) + shift; scale comes first here, unlike in AdaLayerNorm."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim * 2)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    @override
    def forward(self, x: Float[Tensor, "b n d"], time_embedding: Float[Tensor, "#b d"]) -> Float[Tensor, "b n d"]:
        scale, shift = self.linear(F.silu(time_embedding)).unsqueeze(1).chunk(2, dim=-1)
        normed: Tensor = self.norm(x) * (1 + scale) + shift
        return normed


class DirectionNorm(nn.Module):
    """sqrt(D) g x / |x|: RMSNorm without an epsilon, its gain named `g` (x-transformers', in E2-TTS)."""

    def __init__(self, dim: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))

    @override
    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        directions: Tensor = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5
        return directions * self.g


class FeedForward(nn.Module):
    """Two linear layers with GELU (tanh form) between, `mult` times as wide inside."""

    def __init__(self, dim: int, mult: float = 4, dropout: float = 0.0):
        super().__init__()
        hidden = int(dim * mult)
        project_in = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"))
        self.ff = nn.Sequential(project_in, nn.Dropout(dropout), nn.Linear(hidden, dim))

    @override
    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        out: Tensor = self.ff(x)
        return out


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes and flags of attention, by the names of f5-tts."""

    heads: int
    dim_head: int
    dropout: float = 0.0
    """Probability, after the output projection."""
    qk_norm: str | None = None
    """'rms_norm' norms queries and keys in each head; None does not."""
    pe_attn_head: int | None = None
    """How many heads get rotary positions; None: all. Not of MMDiT."""
    attn_mask_enabled: bool = False
    """Whether padding is hidden from attention. False in every released F5-TTS model: padded frames are attended to,
    unless a velocity is asked to be `exact`."""


class SelfAttention(nn.Module):
    """Attention over frames with rotary positions."""

    def __init__(self, dim: int, config: AttentionConfig):
        super().__init__()
        self.heads = config.heads
        self.pe_attn_head = config.pe_attn_head
        self.attn_mask_enabled = config.attn_mask_enabled
        width = config.heads * config.dim_head
        self.to_q = nn.Linear(dim, width)
        self.to_k = nn.Linear(dim, width)
        self.to_v = nn.Linear(dim, width)
        self.q_norm = _head_norm(config)
        self.k_norm = _head_norm(config)
        self.to_out = nn.ModuleList([nn.Linear(width, dim), nn.Dropout(config.dropout)])

    def project(self, x: Float[Tensor, "b n d"]) -> Sequence[Float[Tensor, "b n w"]]:
        """Queries, keys, values, each w = heads * dim_head wide."""
        return self.to_q(x), self.to_k(x), self.to_v(x)

    def turned(self, x: Float[Tensor, "b n d"], rope: Rope) -> Sequence[Float[Tensor, "b n h c"]]:
        """Queries and keys, normed and at their positions, and values."""
        query, key, value = (split_heads(projected, self.heads) for projected in self.project(x))
        query = apply_rope(norm_heads(query, self.q_norm), rope, self.pe_attn_head)
        key = apply_rope(norm_heads(key, self.k_norm), rope, self.pe_attn_head)
        return query, key, value

    @override
    def forward(
        self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None, rope: Rope, exact: bool = False
    ) -> Float[Tensor, "b n d"]:
        query, key, value = self.turned(x, rope)
        attended = mask[:, None, None, :] if (self.attn_mask_enabled or exact) and mask is not None else None
        x = attention(query, key, value, attended)
        project_out, dropout = self.to_out
        return zero_padding(dropout(project_out(x)), mask)


class JointAttention(nn.Module):
    """Attention of audio frames and text tokens together, each with projections of its own (MM-DiT).

    Esser et al. 2024 (arXiv:2403.03206). Rotary positions count from 0 in both. In the `last` block the text is
    read and not written.
    """

    def __init__(self, dim: int, config: AttentionConfig, last: bool = False):
        super().__init__()
        self.heads = config.heads
        self.attn_mask_enabled = config.attn_mask_enabled
        width = config.heads * config.dim_head
        for name in ("to_q", "to_k", "to_v", "to_q_c", "to_k_c", "to_v_c"):
            setattr(self, name, nn.Linear(dim, width))
        for name in ("q_norm", "k_norm", "c_q_norm", "c_k_norm"):
            setattr(self, name, _head_norm(config))
        self.to_out = nn.ModuleList([nn.Linear(width, dim), nn.Dropout(config.dropout)])
        self.to_out_c = None if last else nn.Linear(width, dim)

    @override
    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b n"] | None,
        text_mask: Bool[Tensor, "b t"],
        rope: Rope,
        text_rope: Rope,
        exact: bool = False,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b t d"] | None]:
        """What is added to the frames x and to the text; None for a text that no later block reads."""
        audio = self._heads(x, (self.to_q, self.to_k, self.to_v), (self.q_norm, self.k_norm), rope)
        words = self._heads(text, (self.to_q_c, self.to_k_c, self.to_v_c), (self.c_q_norm, self.c_k_norm), text_rope)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(audio, words, strict=True))
        attended = None
        if exact or (self.attn_mask_enabled and mask is not None):
            frames_mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
            attended = torch.cat((frames_mask, text_mask), dim=1)[:, None, None, :]
        joint = attention(query, key, value, attended)
        project_out, dropout = self.to_out
        for_frames = zero_padding(dropout(project_out(joint[:, : x.shape[1]])), mask)
        if self.to_out_c is None:
            return for_frames, None
        return for_frames, zero_padding(self.to_out_c(joint[:, x.shape[1] :]), text_mask)

    def _heads(self, x: Tensor, projections: Any, norms: Any, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split_heads(project(x), self.heads) for project in projections)
        query, key = (apply_rope(norm_heads(x, norm), rope) for x, norm in zip((query, key), norms, strict=True))
        return query, key, value


def split_heads(x: Float[Tensor, "b n w"], heads: int) -> Float[Tensor, "b n h c"]:
    """Channels of each head apart, w = h c."""
    return torch.unflatten(x, -1, (heads, -1))


def attention(
    query: Float[Tensor, "b n h c"],
    key: Float[Tensor, "b n h c"],
    value: Float[Tensor, "b n h c"],
    mask: Bool[Tensor, "b 1 1 n"] | None,
) -> Float[Tensor, "b n w"]:
    """Softmax attention, heads side by side again (w = h c). Kernels read this layout without a copy."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def norm_heads(x: Float[Tensor, "b n h c"], norm: nn.RMSNorm | None) -> Float[Tensor, "b n h c"]:
    """x normed in the dtype of the norm's weights (under autocast these stay float32), returned in its own."""
    if norm is None:
        return x
    normed: Tensor = norm(x.to(norm.weight.dtype))
    return normed.to(x.dtype)


def _head_norm(config: AttentionConfig) -> nn.RMSNorm | None:
    if config.qk_norm not in (None, "rms_norm"):
        raise ValueError(f"qk_norm: expected None or 'rms_norm', got {config.qk_norm!r}")
    return nn.RMSNorm(config.dim_head, eps=1e-6) if config.qk_norm else None
