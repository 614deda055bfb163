"""MMDiT: a backbone in which text keeps its own length and its own stream, joined with the frames in attention.

Reference: MM-DiT, Esser et al. 2024 (arXiv:2403.03206), as F5-TTS, Chen et al. 2024 (arXiv:2410.06885), has it.
Constructor arguments, state_dict keys and numbers are those of f5-tts 1.1.22; no weights of it are published.
Time convention: see path.py. Pure, as _base.py says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from rlhf_mel.f5.backbones._base import Arch, Backbone
from rlhf_mel.f5.backbones._common import RotaryBuffer, drop_tokens, run_block, start_from_zero
from rlhf_mel.f5.layers import (
    AdaLayerNorm,
    AdaLayerNormFinal,
    ConvPositionEmbedding,
    FeedForward,
    JointAttention,
    Rope,
    position_table,
    zero_padding,
)


@dataclass(frozen=True, kw_only=True)
class MMDiTArch(Arch):
    """Constructor arguments of MMDiT."""

    checkpoint_activations: bool = False
    """Whether a block's activations are computed again in backward()."""


class TokenEmbedding(nn.Module):
    """Token ids to vectors with absolute positions; nothing is laid over frames."""

    def __init__(self, dim: int, text_num_embeds: int, mask_padding: bool = True):
        super().__init__()
        self.mask_padding = mask_padding
        self.text_embed = nn.Embedding(text_num_embeds + 1, dim)

    @override
    def forward(self, text: Int[Tensor, "b t"], drop_text: bool | Bool[Tensor, " b"] = False) -> Float[Tensor, "b t d"]:
        embedded = self.text_embed(drop_tokens(text + 1, drop_text))
        embedded = embedded + position_table(text.shape[1], embedded.shape[2], text.device).to(embedded.dtype)
        return zero_padding(embedded, text != -1 if self.mask_padding else None)


class AudioEmbedding(nn.Module):
    """Noisy and known mel, side by side in each frame, plus convolutional positions."""

    def __init__(self, mel_dim: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(mel_dim * 2, dim)
        self.conv_pos_embed = ConvPositionEmbedding(dim)

    @override
    def forward(
        self, x: Float[Tensor, "b n m"], cond: Float[Tensor, "b n m"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        hidden: Tensor = self.linear(torch.cat((x, cond), dim=-1))
        positioned: Tensor = self.conv_pos_embed(hidden, mask) + hidden
        return positioned


class MMDiTBlock(nn.Module):
    """Joint attention, then a feed-forward for each stream, normed and gated by the time; the last one's text ends."""

    def __init__(self, arch: MMDiTArch, last: bool):
        super().__init__()
        self.attn_norm_c = AdaLayerNormFinal(arch.dim) if last else AdaLayerNorm(arch.dim)
        self.attn_norm_x = AdaLayerNorm(arch.dim)
        self.attn = JointAttention(arch.dim, arch.attention, last=last)
        self.ff_c = None if last else FeedForward(arch.dim, arch.ff_mult, arch.dropout)
        self.ff_x = FeedForward(arch.dim, arch.ff_mult, arch.dropout)
        self.ff_norm = nn.LayerNorm(arch.dim, elementwise_affine=False, eps=1e-6)

    @override
    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: Float[Tensor, "b t d"],
        time_embedding: Float[Tensor, "#b d"],
        mask: Bool[Tensor, "b n"] | None,
        text_mask: Bool[Tensor, "b t"],
        rope: Rope,
        text_rope: Rope,
        exact: bool = False,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b t d"]]:
        normed, *modulation = self.attn_norm_x(x, time_embedding)
        if self.ff_c is None:
            text_normed, text_modulation = self.attn_norm_c(text, time_embedding), []
        else:
            text_normed, *text_modulation = self.attn_norm_c(text, time_embedding)
        attended, text_attended = self.attn(normed, text_normed, mask, text_mask, rope, text_rope, exact)
        x = self._update(x, attended, self.ff_x, modulation)
        return x, text if self.ff_c is None else self._update(text, text_attended, self.ff_c, text_modulation)

    def _update(self, x: Tensor, attended: Tensor, feed_forward: nn.Module, modulation: list[Tensor]) -> Tensor:
        gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = x + gate * attended
        out: Tensor = x + mlp_gate * feed_forward(self.ff_norm(x) * (1 + mlp_scale) + mlp_shift)
        return out


class MMDiT(Backbone):
    """Blocks over mel frames and text, which keeps its own length."""

    def __init__(self, **arguments: Any):
        """Fields of MMDiTArch."""
        arch = MMDiTArch(**arguments)
        super().__init__(arch)
        self.checkpoint_activations = arch.checkpoint_activations
        self.text_embed = TokenEmbedding(arch.dim, arch.text_num_embeds, arch.text_mask_padding)
        self.audio_embed = AudioEmbedding(arch.mel_dim, arch.dim)
        self.rotary_embed = RotaryBuffer(arch.dim_head)
        self.transformer_blocks = nn.ModuleList(
            MMDiTBlock(arch, last=index == arch.depth - 1) for index in range(arch.depth)
        )
        self.norm_out = AdaLayerNormFinal(arch.dim)
        self.proj_out = nn.Linear(arch.dim, arch.mel_dim)
        start_from_zero(self, self.proj_out)

    @override
    def _embed_text(
        self, text: Tensor, frames: int, lengths_frames: Tensor | None, drop_text: bool | Tensor, exact: bool
    ) -> Tensor:
        """[b, t, d + 1]: the last channel is 1 where there is a token. The text has its own length, not `frames`."""
        embedded: Tensor = self.text_embed(text, drop_text)
        return torch.cat((embedded, (text != -1).unsqueeze(-1).to(embedded.dtype)), dim=-1)

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
        ropes = (rope, self.rope(text_embedding.shape[1], x.device))
        hidden = self.audio_embed(x, cond, mask if exact else None)  # f5-tts: its convolutions see the padding
        text, text_mask = text_embedding[..., :-1], text_embedding[..., -1] > 0
        for block in self.transformer_blocks:
            inputs = (hidden, text, time_embedding, mask, text_mask, *ropes, exact)
            hidden, text = run_block(block, *inputs, checkpointed=self.checkpoint_activations)
        velocity: Tensor = self.proj_out(self.norm_out(hidden, time_embedding))
        return velocity
