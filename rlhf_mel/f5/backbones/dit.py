"""DiT, the backbone of F5-TTS: a transformer over mel frames that predicts v(x_t, t | mel, text).

Reference: F5-TTS, Chen et al. 2024 (arXiv:2410.06885); DiT, Peebles & Xie 2023 (arXiv:2212.09748).
Constructor arguments, state_dict keys and numbers are those of f5-tts 1.1.22; time convention: see path.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from rlhf_mel.f5.backbones._base import Backbone, FrameTextArch
from rlhf_mel.f5.backbones._common import InputEmbedding, RotaryBuffer, TextEmbedding, run_block, start_from_zero
from rlhf_mel.f5.layers import AdaLayerNorm, AdaLayerNormFinal, FeedForward, Rope, SelfAttention


@dataclass(frozen=True, kw_only=True)
class DiTArch(FrameTextArch):
    """Constructor arguments of DiT."""

    text_embedding_average_upsampling: bool = False
    """Whether text is spread evenly over all frames, and not laid over the first."""
    long_skip_connection: bool = False
    """Whether the last block's output is joined with the first one's input."""
    checkpoint_activations: bool = False
    """Whether a block's activations are computed again in backward()."""


class DiTBlock(nn.Module):
    """Attention, then a feed-forward, each normed and gated by the time (AdaLN-zero); residual."""

    def __init__(self, arch: DiTArch):
        super().__init__()
        self.attn_norm = AdaLayerNorm(arch.dim)
        self.attn = SelfAttention(arch.dim, arch.attention)
        self.ff_norm = nn.LayerNorm(arch.dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(arch.dim, arch.ff_mult, arch.dropout)

    @override
    def forward(
        self,
        x: Float[Tensor, "b n d"],
        time_embedding: Float[Tensor, "#b d"],
        mask: Bool[Tensor, "b n"] | None,
        rope: Rope,
        exact: bool = False,
    ) -> Float[Tensor, "b n d"]:
        hidden, gate, mlp_shift, mlp_scale, mlp_gate = self.attn_norm(x, time_embedding)
        x = x + gate * self.attn(hidden, mask, rope, exact)
        hidden = self.ff_norm(x) * (1 + mlp_scale) + mlp_shift
        out: Tensor = x + mlp_gate * self.ff(hidden)
        return out


class DiT(Backbone):
    """Blocks over mel frames; text is laid over the frames."""

    def __init__(self, **arguments: Any):
        """Fields of DiTArch."""
        arch = DiTArch(**arguments)
        super().__init__(arch)
        self.checkpoint_activations = arch.checkpoint_activations
        text_dim = arch.mel_dim if arch.text_dim is None else arch.text_dim
        self.text_embed = TextEmbedding(
            arch.text_num_embeds,
            text_dim,
            arch.text_mask_padding,
            arch.text_embedding_average_upsampling,
            arch.conv_layers,
        )
        self.input_embed = InputEmbedding(arch.mel_dim, text_dim, arch.dim)
        self.rotary_embed = RotaryBuffer(arch.dim_head)
        self.transformer_blocks = nn.ModuleList(DiTBlock(arch) for _ in range(arch.depth))
        self.long_skip_connection = nn.Linear(arch.dim * 2, arch.dim, bias=False) if arch.long_skip_connection else None
        self.norm_out = AdaLayerNormFinal(arch.dim)
        self.proj_out = nn.Linear(arch.dim, arch.mel_dim)
        start_from_zero(self, self.proj_out)

    @override
    def _embed_text(
        self, text: Tensor, frames: int, lengths_frames: Tensor | None, drop_text: bool | Tensor, exact: bool
    ) -> Tensor:
        embedded: Tensor = self.text_embed(text, frames, lengths_frames, drop_text, exact)
        return embedded

    @override
    def _velocity(
        self,
        x: Tensor,
        cond: Tensor,
        text_embedding: Tensor,
        time_embedding: Tensor,
        mask: Tensor | None,
        rope: Rope,
        exact: bool,
    ) -> Tensor:
        hidden = first = self.input_embed(x, cond, text_embedding, mask)
        for block in self.transformer_blocks:
            inputs = (hidden, time_embedding, mask, rope, exact)
            hidden = run_block(block, *inputs, checkpointed=self.checkpoint_activations)
        if self.long_skip_connection is not None:
            hidden = self.long_skip_connection(torch.cat((hidden, first), dim=-1))
        velocity: Tensor = self.proj_out(self.norm_out(hidden, time_embedding))
        return velocity
