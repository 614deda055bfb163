"""UNetT, the backbone of E2-TTS: a flat transformer whose second half sees the first half's layers again.

    x = [time; frames];  first half: push x, x = layer(x);  second half: x = layer(skip(x, pop)))

Reference: E2 TTS, Eskimez et al. 2024 (arXiv:2406.18009), as in F5-TTS, Chen et al. 2024 (arXiv:2410.06885).
Constructor arguments, state_dict keys and numbers are those of f5-tts 1.1.22; time convention: see path.py.
Time is one more position before the frames, there is no AdaLN, and text is its embedding alone unless
`conv_layers` is given. Pure in the sense of dit.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_mel.f5.backbones._common import InputEmbedding, RotaryBuffer, TextEmbedding, forward_as_f5
from rlhf_mel.f5.layers import DirectionNorm, FeedForward, Rope, SelfAttention, TimestepEmbedding, rotary_table

SKIPS = ("concat", "add", "none")


class UNetT(nn.Module):
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
        qk_norm: str | None = None,
        conv_layers: int = 0,
        pe_attn_head: int | None = None,
        attn_backend: str = "torch",
        attn_mask_enabled: bool = False,
        skip_connect_type: str = "concat",
    ):
        """Arguments of f5-tts; `attn_backend` is accepted, PyTorch's own dispatch picks the kernel."""
        super().__init__()
        if depth % 2:
            raise ValueError(f"depth: expected an even number of layers, each with its counterpart, got {depth}")
        if skip_connect_type not in SKIPS:
            raise ValueError(f"skip_connect_type: expected one of {list(SKIPS)}, got {skip_connect_type!r}")
        self.arch = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.dim, self.depth, self.dim_head = dim, depth, dim_head
        self.skip_connect_type = skip_connect_type
        text_dim = mel_dim if text_dim is None else text_dim
        self.time_embed = TimestepEmbedding(dim)
        self.text_embed = TextEmbedding(text_num_embeds, text_dim, text_mask_padding, conv_layers=conv_layers)
        self.input_embed = InputEmbedding(mel_dim, text_dim, dim)
        self.rotary_embed = RotaryBuffer(dim_head)
        attention = dict(
            heads=heads,
            dim_head=dim_head,
            dropout=dropout,
            qk_norm=qk_norm,
            pe_attn_head=pe_attn_head,
            attn_mask_enabled=attn_mask_enabled,
        )
        self.layers = nn.ModuleList(
            _layer(dim, ff_mult, attention, joins=skip_connect_type == "concat" and index >= depth // 2)
            for index in range(depth)
        )
        self.norm_out = DirectionNorm(dim)
        self.proj_out = nn.Linear(dim, mel_dim)

    def rope(self, frames: int, device: torch.device | None = None) -> Rope:
        """Rotary angles of time and `frames` after it, float32; once a solve."""
        return rotary_table(frames + 1, self.dim_head, device or self.proj_out.weight.device)

    def embed_text(
        self, text: Tensor, frames: int, lengths_frames: Tensor | None = None, *, drop_text: bool | Tensor = False
    ) -> Tensor:
        """Token ids [B, N], padded with -1, to [B, T, text_dim]; once a solve, with its graph.

        `lengths_frames` changes nothing: text is embedded over all T frames. `drop_text`: as in dit.py.
        """
        return self.text_embed(text, frames, None, drop_text)

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
        """Velocity [B, T, M] at x [B, T, M], given known mel `cond` [B, T, M], `embed_text` and mask [B, T]."""
        rope = self.rope(x.shape[1], x.device) if rope is None else rope
        time_embedding = self.time_embed(time.reshape(-1), x.dtype).expand(len(x), -1)
        frames = self.input_embed(x, cond, text_embedding, None)  # f5-tts: its convolutions see the padding
        hidden = torch.cat((time_embedding.unsqueeze(1), frames), dim=1)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        skips: list[Tensor] = []
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            join, attention_norm, attention, feed_forward_norm, feed_forward = layer
            if index < self.depth // 2:
                skips.append(hidden)
            else:
                hidden = self._join(join, hidden, skips.pop())
            hidden = hidden + attention(attention_norm(hidden), mask, rope)
            hidden = hidden + feed_forward(feed_forward_norm(hidden))
        return self.proj_out(self.norm_out(hidden)[:, 1:])

    def _join(self, join: nn.Module | None, hidden: Tensor, skip: Tensor) -> Tensor:
        if join is not None:
            return join(torch.cat((hidden, skip), dim=-1))
        return hidden + skip if self.skip_connect_type == "add" else hidden

    forward = forward_as_f5


def _layer(dim: int, ff_mult: float, attention: dict[str, Any], *, joins: bool) -> nn.ModuleList:
    """Join, norm, attention, norm, feed-forward: F5-TTS's checkpoints number them 0 to 4."""
    join: Any = nn.Linear(dim * 2, dim, bias=False) if joins else None
    feed_forward = FeedForward(dim, ff_mult, attention["dropout"])
    return nn.ModuleList([join, DirectionNorm(dim), SelfAttention(dim, **attention), DirectionNorm(dim), feed_forward])
