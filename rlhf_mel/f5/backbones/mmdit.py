"""MMDiT: a backbone in which text keeps its own length and its own stream, joined with the frames in attention.

Reference: MM-DiT, Esser et al. 2024 (arXiv:2403.03206), as F5-TTS, Chen et al. 2024 (arXiv:2410.06885), has it.
Constructor arguments, state_dict keys and numbers are those of f5-tts 1.1.22; no weights of it are published.
Time convention: see path.py. Pure in the sense of dit.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_mel.f5.backbones._common import RotaryBuffer, drop_tokens, forward_as_f5, run_block, start_from_zero
from rlhf_mel.f5.layers import (
    AdaLayerNorm,
    AdaLayerNormFinal,
    ConvPositionEmbedding,
    FeedForward,
    JointAttention,
    Rope,
    TimestepEmbedding,
    position_table,
    rotary_table,
    zero_padding,
)


class TokenEmbedding(nn.Module):
    """Token ids [B, N] to [B, N, D] with absolute positions; nothing is laid over frames."""

    def __init__(self, dim: int, text_num_embeds: int, mask_padding: bool = True):
        super().__init__()
        self.mask_padding = mask_padding
        self.text_embed = nn.Embedding(text_num_embeds + 1, dim)

    def forward(self, text: Tensor, drop_text: bool | Tensor = False) -> Tensor:
        embedded = self.text_embed(drop_tokens(text + 1, drop_text))
        embedded = embedded + position_table(text.shape[1], embedded.shape[2], text.device).to(embedded.dtype)
        return zero_padding(embedded, text != -1 if self.mask_padding else None)


class AudioEmbedding(nn.Module):
    """Noisy and known mel, side by side in each frame, plus convolutional positions (that see the padding)."""

    def __init__(self, mel_dim: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(mel_dim * 2, dim)
        self.conv_pos_embed = ConvPositionEmbedding(dim)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        hidden = self.linear(torch.cat((x, cond), dim=-1))
        return self.conv_pos_embed(hidden) + hidden


class MMDiTBlock(nn.Module):
    def __init__(self, dim: int, ff_mult: float, dropout: float, last: bool, **attention: Any):
        super().__init__()
        self.attn_norm_c = AdaLayerNormFinal(dim) if last else AdaLayerNorm(dim)
        self.attn_norm_x = AdaLayerNorm(dim)
        self.attn = JointAttention(dim, dropout=dropout, last=last, **attention)
        self.ff_c = None if last else FeedForward(dim, ff_mult, dropout)
        self.ff_x = FeedForward(dim, ff_mult, dropout)
        self.ff_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        time_embedding: Tensor,
        mask: Tensor | None,
        text_mask: Tensor,
        rope: Rope,
        text_rope: Rope,
    ) -> tuple[Tensor, Tensor]:
        heard, *modulation = self.attn_norm_x(x, time_embedding)
        if self.ff_c is None:
            read, text_modulation = self.attn_norm_c(text, time_embedding), []
        else:
            read, *text_modulation = self.attn_norm_c(text, time_embedding)
        taken, text_taken = self.attn(heard, read, mask, text_mask, rope, text_rope)
        x = self._update(x, taken, self.ff_x, modulation)
        return x, text if self.ff_c is None else self._update(text, text_taken, self.ff_c, text_modulation)

    def _update(self, x: Tensor, taken: Tensor, feed_forward: nn.Module, modulation: list[Tensor]) -> Tensor:
        gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = x + gate * taken
        return x + mlp_gate * feed_forward(self.ff_norm(x) * (1 + mlp_scale) + mlp_shift)


class MMDiT(nn.Module):
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
        text_mask_padding: bool = True,
        qk_norm: str | None = None,
        checkpoint_activations: bool = False,
        attn_backend: str = "torch",
        attn_mask_enabled: bool = False,
    ):
        """Arguments of f5-tts; `attn_backend` is accepted, PyTorch's own dispatch picks the kernel."""
        super().__init__()
        self.arch = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.dim, self.depth, self.dim_head = dim, depth, dim_head
        self.checkpoint_activations = checkpoint_activations
        self.time_embed = TimestepEmbedding(dim)
        self.text_embed = TokenEmbedding(dim, text_num_embeds, text_mask_padding)
        self.audio_embed = AudioEmbedding(mel_dim, dim)
        self.rotary_embed = RotaryBuffer(dim_head)
        attention = dict(heads=heads, dim_head=dim_head, qk_norm=qk_norm, attn_mask_enabled=attn_mask_enabled)
        self.transformer_blocks = nn.ModuleList(
            MMDiTBlock(dim, ff_mult, dropout, index == depth - 1, **attention) for index in range(depth)
        )
        self.norm_out = AdaLayerNormFinal(dim)
        self.proj_out = nn.Linear(dim, mel_dim)
        start_from_zero(self, self.proj_out)

    def rope(self, frames: int, device: torch.device | None = None) -> Rope:
        """Rotary angles for `frames`, float32; once a solve."""
        return rotary_table(frames, self.dim_head, device or self.proj_out.weight.device)

    def embed_text(
        self, text: Tensor, frames: int, lengths_frames: Tensor | None = None, *, drop_text: bool | Tensor = False
    ) -> Tensor:
        """Token ids [B, N], padded with -1, to [B, N, D + 1]: the last channel is 1 where there is a token.

        Once a solve, with its graph. The text has its own length: neither `frames` nor their lengths matter.
        """
        embedded = self.text_embed(text, drop_text)
        return torch.cat((embedded, (text != -1).unsqueeze(-1).to(embedded.dtype)), dim=-1)

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
        ropes = (
            self.rope(x.shape[1], x.device) if rope is None else rope,
            self.rope(text_embedding.shape[1], x.device),
        )
        time_embedding = self.time_embed(time.reshape(-1), x.dtype)
        hidden = self.audio_embed(x, cond)
        text, text_mask = text_embedding[..., :-1], text_embedding[..., -1] > 0
        for block in self.transformer_blocks:
            inputs = (hidden, text, time_embedding, mask, text_mask, *ropes)
            hidden, text = run_block(block, *inputs, checkpointed=self.checkpoint_activations)
        return self.proj_out(self.norm_out(hidden, time_embedding))

    forward = forward_as_f5
