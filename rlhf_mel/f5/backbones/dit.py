"""DiT, the backbone of F5-TTS: a transformer over mel frames that predicts v(x_t, t | mel, text).

Reference: F5-TTS, Chen et al. 2024 (arXiv:2410.06885); DiT, Peebles & Xie 2023 (arXiv:2212.09748).
Constructor arguments, state_dict keys and numbers are those of f5-tts 1.1.22; time convention: see path.py.

The module holds no state besides weights. What a solve needs only once (`embed_text`, `rope`) is computed
outside and passed in, so `velocity` is pure: shapes decide everything, nothing waits for the device, and one
velocity can be checkpointed, compiled block by block, or captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_mel.f5.backbones._common import (
    InputEmbedding,
    RotaryBuffer,
    TextEmbedding,
    forward_as_f5,
    run_block,
    start_from_zero,
)
from rlhf_mel.f5.layers import (
    AdaLayerNorm,
    AdaLayerNormFinal,
    FeedForward,
    Rope,
    SelfAttention,
    TimestepEmbedding,
    rotary_table,
)


class DiTBlock(nn.Module):
    def __init__(self, dim: int, ff_mult: float, dropout: float, **attention: Any):
        super().__init__()
        self.attn_norm = AdaLayerNorm(dim)
        self.attn = SelfAttention(dim, dropout=dropout, **attention)
        self.ff_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, ff_mult, dropout)

    def forward(self, x: Tensor, time_embedding: Tensor, mask: Tensor | None, rope: Rope) -> Tensor:
        hidden, gate, mlp_shift, mlp_scale, mlp_gate = self.attn_norm(x, time_embedding)
        x = x + gate * self.attn(hidden, mask, rope)
        hidden = self.ff_norm(x) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.ff(hidden)


class DiT(nn.Module):
    def __init__(
        self,
        *,
        dim: int,
        depth: int = 8,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.1,
        ff_mult: float = 4,
        mel_dim: int = 100,
        text_num_embeds: int = 256,
        text_dim: int | None = None,
        text_mask_padding: bool = True,
        text_embedding_average_upsampling: bool = False,
        qk_norm: str | None = None,
        conv_layers: int = 0,
        pe_attn_head: int | None = None,
        attn_backend: str = "torch",
        attn_mask_enabled: bool = False,
        long_skip_connection: bool = False,
        checkpoint_activations: bool = False,
    ):
        """Arguments of f5-tts; `attn_backend` is accepted, PyTorch's own dispatch picks the kernel."""
        super().__init__()
        self.arch = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.dim, self.depth, self.dim_head = dim, depth, dim_head
        self.checkpoint_activations = checkpoint_activations
        text_dim = mel_dim if text_dim is None else text_dim
        self.time_embed = TimestepEmbedding(dim)
        self.text_embed = TextEmbedding(
            text_num_embeds, text_dim, text_mask_padding, text_embedding_average_upsampling, conv_layers
        )
        self.input_embed = InputEmbedding(mel_dim, text_dim, dim)
        self.rotary_embed = RotaryBuffer(dim_head)
        attention = dict(
            heads=heads,
            dim_head=dim_head,
            qk_norm=qk_norm,
            pe_attn_head=pe_attn_head,
            attn_mask_enabled=attn_mask_enabled,
        )
        self.transformer_blocks = nn.ModuleList(DiTBlock(dim, ff_mult, dropout, **attention) for _ in range(depth))
        self.long_skip_connection = nn.Linear(dim * 2, dim, bias=False) if long_skip_connection else None
        self.norm_out = AdaLayerNormFinal(dim)
        self.proj_out = nn.Linear(dim, mel_dim)
        start_from_zero(self, self.proj_out)

    def rope(self, frames: int, device: torch.device | None = None) -> Rope:
        """Rotary angles for `frames`, float32; once a solve."""
        return rotary_table(frames, self.dim_head, device or self.proj_out.weight.device)

    def embed_text(
        self, text: Tensor, frames: int, lengths_frames: Tensor | None = None, *, drop_text: bool | Tensor = False
    ) -> Tensor:
        """Token ids [B, N], padded with -1, to [B, T, text_dim]; once a solve, with its graph.

        lengths_frames [B] where items are shorter than T; `drop_text` (all, or bool [B]) for guidance.
        """
        return self.text_embed(text, frames, lengths_frames, drop_text)

    def velocity(
        self,
        x: Tensor,
        cond: Tensor,
        text_embedding: Tensor,
        time: Tensor,
        *,
        mask: Tensor | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """Velocity [B, T, M] at x [B, T, M], given known mel `cond` [B, T, M], `embed_text` and mask [B, T].

        `time` [B], or a scalar (or [1]) shared by the batch: AdaLN then runs on one row.
        """
        rope = self.rope(x.shape[1], x.device) if rope is None else rope
        time_embedding = self.time_embed(time.reshape(-1), x.dtype)
        hidden = first = self.input_embed(x, cond, text_embedding, mask)
        for block in self.transformer_blocks:
            hidden = run_block(block, hidden, time_embedding, mask, rope, checkpointed=self.checkpoint_activations)
        if self.long_skip_connection is not None:
            hidden = self.long_skip_connection(torch.cat((hidden, first), dim=-1))
        return self.proj_out(self.norm_out(hidden, time_embedding))

    forward = forward_as_f5
